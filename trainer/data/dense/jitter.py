"""Large-scale jitter (Ghiasi et al., "Simple Copy-Paste", 2021, section 3): what detectors are trained on."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from mixmae.base.image_size import ImageSize, both_sides
from mixmae.trainer.data.decode import open_encoded, upright_size_of
from mixmae.trainer.data.dense.objects import Objects, parse_objects
from mixmae.trainer.data.dense.padding import paste_padded
from mixmae.trainer.data.dense.resizing import fit_into
from mixmae.trainer.data.dense.view import View
from mixmae.trainer.data.transform import AnnotatedTransform, BatchBuffers, shared_images
from mixmae.trainer.recipe.sections.data import Data


@dataclass(frozen=True)
class LargeScaleJitterCrop(AnnotatedTransform):
    """The image, perhaps mirrored, fitted into `scale` times a window of `size`, then cropped or padded to it.

    Targets, N objects of all images together: `boxes` fp32 [N, 4] (left, upper, right, lower, in pixels of the crop),
    `classes` int64 [N], `masks` uint8 [N, H, W / 8] (`np.packbits` of each row), `counts` int64 [B]. A box is
    that of its mask's visible part. Objects that are not visible are left out, and so are crowds.

    Attributes:
        size: of the window; its width a multiple of 8.
    """

    size: ImageSize
    settings: Data
    scale: tuple[float, float] = (0.1, 2.0)

    def new_batch(self, count: int) -> BatchBuffers:
        assert both_sides(self.size)[1] % 8 == 0, "masks are packed into bytes"
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
        scale, window = random.uniform(*self.scale), both_sides(self.size)
        resized = fit_into(height, width, (scale * window[0], scale * window[1]))
        rows, columns = min(window[0], resized[0]), min(window[1], resized[1])
        top, left = (int(random.random() * (a - b + 1)) for a, b in zip(resized, (rows, columns), strict=True))
        return View(height, width, resized, top, left, rows, columns, mirrored)

    def targets(self, objects: Objects, view: View) -> dict[str, np.ndarray[Any, Any]]:
        """The targets of an image's objects in a view."""
        masks = [(i, view.mask(objects.segmentations[i])) for i in np.flatnonzero(~objects.crowd)]
        seen = [(i, mask) for i, mask in masks if mask is not None]
        rows, columns = both_sides(self.size)
        packed = np.empty((len(seen), rows, columns // 8), np.uint8)
        for number, (_, mask) in enumerate(seen):
            packed[number] = mask.packed(rows, columns)
        return {
            "boxes": np.array([mask.box for _, mask in seen], np.float32).reshape(-1, 4),
            "classes": objects.classes[[i for i, _ in seen]],
            "masks": packed,
        }
