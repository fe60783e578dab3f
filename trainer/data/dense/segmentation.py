"""Random crops for semantic segmentation, as mmsegmentation's recipes for ADE20K take them."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch

from mixmae.base.image_size import ImageSize, both_sides
from mixmae.trainer.data.decode import open_encoded, upright_size_of
from mixmae.trainer.data.dense.label_maps import IGNORED, LabelMap, parse_label_map
from mixmae.trainer.data.dense.padding import paste_padded
from mixmae.trainer.data.dense.photometric import distort
from mixmae.trainer.data.dense.resizing import fit_over
from mixmae.trainer.data.dense.view import View
from mixmae.trainer.data.transform import AnnotatedTransform, BatchBuffers, shared_empty, shared_images
from mixmae.trainer.recipe.sections.data import Data

_MAX_SHARE = 0.75
_TRIES = 10


@dataclass(frozen=True)
class SegmentationCrop(AnnotatedTransform):
    """A crop of the image resized so that it covers `scale` times a window of `size`: mirrored, distorted, padded.

    Its longer side is at most four times as long as that window's. Of several crops the first is taken of which less
    than three quarters is one class. Target: `segmentation` uint8 [B, H, W], 255 where a pixel is ignored or padding.
    """

    size: ImageSize
    settings: Data
    scale: tuple[float, float] = (0.5, 2.0)

    def new_batch(self, count: int) -> BatchBuffers:
        segmentation = shared_empty((count, *both_sides(self.size)), torch.uint8)
        return BatchBuffers(shared_images(count, self.size), {"segmentation": segmentation})

    def read_annotated(
        self, content: bytes, annotation: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int
    ) -> None:
        source = open_encoded(content, int(row["state"]), self.settings.decoder, self.settings.max_pixels)
        labels = parse_label_map(annotation, *upright_size_of(source))
        view, seen = self.draw(labels, random)
        paste_padded(distort(view.pixels(source), random), buffers.images[i], self.settings.mean)
        segmentation = buffers.targets["segmentation"][i].numpy()
        segmentation[:] = IGNORED
        segmentation[: view.rows, : view.columns] = seen

    def draw(self, labels: LabelMap, random: Random) -> tuple[View, LabelMap]:
        """A random view of an image with a label map, and the labels in it."""
        height, width = labels.shape
        scale, window = random.uniform(*self.scale), both_sides(self.size)
        resized = fit_over(height, width, (scale * window[0], scale * window[1]))
        rows, columns = min(window[0], resized[0]), min(window[1], resized[1])
        mirrored = random.random() < self.settings.hflip
        for _ in range(_TRIES + 1):
            top, left = (int(random.random() * (a - b + 1)) for a, b in zip(resized, (rows, columns), strict=True))
            view = View(height, width, resized, top, left, rows, columns, mirrored)
            seen = view.labels(labels)
            if _is_mixed(seen):
                break
        return view, seen


def _is_mixed(labels: LabelMap) -> bool:
    """Whether there are two classes or more, none of which has three quarters of the pixels that have one."""
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return bool(np.count_nonzero(counts) > 1 and counts.max() < _MAX_SHARE * counts.sum())
