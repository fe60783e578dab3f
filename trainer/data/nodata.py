"""Pixels that hold nothing, such as those around a satellite's swath: found, filled, and followed through a resize."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mixmae.trainer.recipe.sections.pixels import PixelFormat

Valid = npt.NDArray[np.bool_]
"""[H, W]: whether a pixel holds something."""
_SUPPORT = 2.0
"""Pixels, of the smaller of both images, that a bicubic filter reaches to each side."""


def find_valid(values: npt.NDArray[Any], nodata: float) -> Valid:
    """Where no channel of an image [H, W, C] has the value that means nothing."""
    missing = np.isnan(values) if math.isnan(nodata) else values == nodata
    return ~missing.any(-1)


def fill_invalid(values: npt.NDArray[Any], valid: Valid, fmt: PixelFormat) -> npt.NDArray[Any]:
    """An image with each channel's mean in the pixels that hold nothing."""
    if valid.all():
        return values
    fill = np.array(fmt.fill, np.float64)
    fill = fill if fmt.dtype == "float32" else fill.round().clip(0, np.iinfo(fmt.dtype).max)
    return np.where(valid[..., None], values, fill.astype(fmt.dtype))


def resize_valid(valid: Valid, height: int, width: int) -> Valid:
    """Which pixels of the resized image (bicubic) are made of pixels alone that hold something."""
    if valid.all():
        return np.ones((height, width), np.bool_)
    missing = np.zeros((valid.shape[0] + 1, valid.shape[1] + 1), np.int64)
    missing[1:, 1:] = (~valid).cumsum(0).cumsum(1)
    top, bottom = (rows[:, None] for rows in _reached(valid.shape[0], height))
    left, right = _reached(valid.shape[1], width)
    count: npt.NDArray[np.int64] = (
        missing[bottom, right] - missing[top, right] - missing[bottom, left] + missing[top, left]
    )
    return count == 0


def _reached(length: int, resized: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First and one past the last of the pixels of a side that the filter weighs for each of the resized one's."""
    if length == resized:  # at whole distances a bicubic filter weighs nothing but the pixel itself
        return np.arange(length), np.arange(1, length + 1)
    scale = length / resized
    reach = _SUPPORT * max(1.0, scale)
    centre = (np.arange(resized) + 0.5) * scale
    first, last = np.floor(centre - reach + 0.5), np.floor(centre + reach + 0.5)
    return first.clip(0, length).astype(np.int64), last.clip(0, length).astype(np.int64)
