"""A window on a resized and perhaps mirrored image, and what an image, a mask and a label map show in it.

All follow one rule: the centre of a window's pixel lies at one point of the upright image, and a mask or label map has
there what its pixel around that point says, while an image is interpolated around it.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from mixmae.trainer.data.decode import decode_upright
from mixmae.trainer.data.dense.masks import Mask, Rle, box_of, decode
from mixmae.trainer.data.encoded_image import EncodedImage, PartialJpeg, Pixels

_REDUCTIONS = (8, 4, 2)


@dataclass(frozen=True)
class View:
    """A window of the upright image resized to `resized`, mirrored as the last step."""

    height: int
    width: int
    """Of the upright image."""
    resized: tuple[int, int]
    """Height and width that the whole image would have."""
    top: int
    left: int
    """Of the window in the resized image."""
    rows: int
    columns: int
    """Of the window."""
    mirrored: bool = False

    def source_rows(self) -> npt.NDArray[np.int64]:
        """The image's row around the centre of each of the window's."""
        return _nearest(self.top, self.rows, self.height, self.resized[0])

    def source_columns(self) -> npt.NDArray[np.int64]:
        """The image's column around the centre of each of the window's, before it is mirrored."""
        return _nearest(self.left, self.columns, self.width, self.resized[1])

    def pixels(self, source: EncodedImage) -> Pixels:
        """The image, resized by a bilinear filter as wide as a pixel of the smaller of both: uint8 [rows, columns, 3].

        No more than the window needs is decoded of a JPEG.

        Raises:
            UnusableError: the decoder finds damage.
        """
        scale_y, scale_x = self.height / self.resized[0], self.width / self.resized[1]
        reducible = isinstance(source, PartialJpeg) and source.orientation == 1
        # The filter smooths two or more of the reduced pixels, so that little is left of how they were reduced.
        reduction = next((r for r in _REDUCTIONS if reducible and min(scale_y, scale_x) >= 2 * r), 1)
        upper, lower = self.top * scale_y / reduction, (self.top + self.rows) * scale_y / reduction
        left, right = self.left * scale_x / reduction, (self.left + self.columns) * scale_x / reduction
        # The filter reaches beyond the window.
        y, x = (math.ceil(max(1.0, scale / reduction)) + 1 for scale in (scale_y, scale_x))
        first_row, last_row = max(0, math.floor(upper) - y), min(-(-self.height // reduction), math.ceil(lower) + y)
        first, last = max(0, math.floor(left) - x), min(-(-self.width // reduction), math.ceil(right) + x)
        found = decode_upright(source, (first, first_row, last, last_row), reduction)
        box = (left - first, upper - first_row, right - first, lower - first_row)
        window = Image.fromarray(found).resize(
            (self.columns, self.rows), Image.Resampling.BILINEAR, _within(box, found)
        )
        pixels = np.asarray(window)
        return pixels[:, ::-1] if self.mirrored else pixels

    def labels(self, labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A label map [height, width] in the window: [rows, columns]."""
        window = labels[self.source_rows()[:, None], self.source_columns()]
        return window[:, ::-1] if self.mirrored else window

    def mask(self, rle: Rle) -> "MaskView | None":
        """An object's mask in the window, or None if none of it is there."""
        left, upper, right, lower = box_of(rle)
        rows, columns = self.source_rows(), self.source_columns()
        top, bottom = np.searchsorted(rows, [upper, lower])
        first, last = np.searchsorted(columns, [left, right])
        if top == bottom or first == last:
            return None
        part = decode(rle)[rows[top:bottom, None], columns[first:last]]
        if self.mirrored:
            part, first = part[:, ::-1], self.columns - last
        there, across = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
        if not len(there):
            return None
        part = part[there[0] : there[-1] + 1, across[0] : across[-1] + 1]
        return MaskView(int(top + there[0]), int(first + across[0]), part)


@dataclass(frozen=True)
class MaskView:
    """The smallest part of a window that holds a mask."""

    top: int
    left: int
    part: Mask

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, upper, right, lower in pixels of the window."""
        return self.left, self.top, self.left + self.part.shape[1], self.top + self.part.shape[0]

    def packed(self, height: int, width: int) -> npt.NDArray[np.uint8]:
        """The mask in a window whose width is a multiple of 8: [height, width / 8], `np.packbits` of each row."""
        rows = np.zeros((self.part.shape[0], width), np.uint8)
        rows[:, self.left : self.left + self.part.shape[1]] = self.part
        packed = np.zeros((height, width // 8), np.uint8)
        packed[self.top : self.top + len(rows)] = np.packbits(rows, axis=1)
        return packed


def _nearest(start: int, count: int, length: int, resized: int) -> npt.NDArray[np.int64]:
    """Pixels of a side of `length` around the centres of `count` pixels of the resized side: whole numbers, exact."""
    return (2 * np.arange(start, start + count) + 1) * length // (2 * resized)


def _within(box: tuple[float, float, float, float], pixels: Pixels) -> tuple[float, float, float, float]:
    """The box, without what rounding put beyond the pixels: Pillow refuses it."""
    left, upper, right, lower = box
    height, width = pixels.shape[:2]
    return max(0.0, left), max(0.0, upper), min(float(width), right), min(float(height), lower)
