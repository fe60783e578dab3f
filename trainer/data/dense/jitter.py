"""Large-scale jitter (Ghiasi et al., "Simple Copy-Paste", 2021, section 3): what detectors are trained on."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from mixmae.trainer.data.decode import open_encoded, upright_size_of
from mixmae.trainer.data.dense.objects import Objects, parse_objects
from mixmae.trainer.data.dense.padding import paste_padded
from mixmae.trainer.data.dense.view import View
from mixmae.trainer.data.transform import AnnotatedTransform, BatchBuffers, shared_images
from mixmae.trainer.recipe.sections.data import Data


@dataclass(frozen=True)
class LargeScaleJitterCrop(AnnotatedTransform):
    """The image, perhaps mirrored, fitted into `scale` times a square of `size` px, then cropped or padded to `size`.

    Targets, N objects of all images together: `boxes` fp32 [N, 4] (left, upper, right, lower, in pixels of the crop),
    `classes` int64 [N], `masks` uint8 [N, size, size / 8] (`np.packbits` of each row), `counts` int64 [B]. A box is
    that of its mask's visible part. Objects that are not visible are left out, and so are crowds.

    Attributes:
        size: a multiple of 8.
    """

    size: int
    settings: Data
    scale: tuple[float, float] = (0.1, 2.0)

    def new_batch(self, count: int) -> BatchBuffers:
        assert self.size % 8 == 0, "masks are packed into bytes"
        return BatchBuffers(shared_images(count, self.size), ragged=[None] * count)

    def read_annotated(
        self, content: bytes, annotation: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int
    ) -> None:
        source = open_encoded(content, int(row["state"]), self.settings.decoder, self.settings.max_pixels)
        height, width = upright_size_of(source)
        view = self.draw(height, width, random)
        objects = parse_objects(annotation, height, width)
        paste_padded(view.pixels(source), buffers.images[i], self.settings.mean)
        buffers.ragged[i] = self.targets(objects, view)

    def draw(self, height: int, width: int, random: Random) -> View:
        """A random view of an upright image."""
        mirrored = random.random() < self.settings.hflip
        factor = random.uniform(*self.scale) * self.size / max(height, width)
        resized = max(1, round(height * factor)), max(1, round(width * factor))
        rows, columns = min(self.size, resized[0]), min(self.size, resized[1])
        top, left = (int(random.random() * (a - b + 1)) for a, b in zip(resized, (rows, columns), strict=True))
        return View(height, width, resized, top, left, rows, columns, mirrored)

    def targets(self, objects: Objects, view: View) -> dict[str, np.ndarray[Any, Any]]:
        """The targets of an image's objects in a view."""
        masks = [(i, view.mask(objects.segmentations[i])) for i in np.flatnonzero(~objects.crowd)]
        seen = [(i, mask) for i, mask in masks if mask is not None]
        packed = np.empty((len(seen), self.size, self.size // 8), np.uint8)
        for number, (_, mask) in enumerate(seen):
            packed[number] = mask.packed(self.size)
        return {
            "boxes": np.array([mask.box for _, mask in seen], np.float32).reshape(-1, 4),
            "classes": objects.classes[[i for i, _ in seen]],
            "masks": packed,
        }
