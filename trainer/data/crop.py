"""Which box of an image a view shows, where that lies in the image as it is stored, and how the view is turned."""

import math
from random import Random
from typing import NamedTuple

from mixmae.base.image_size import ImageSize, both_sides

Box = tuple[int, int, int, int]
"""left, upper, right, lower, in pixels of the image."""
_ASPECT = (3 / 4, 4 / 3)
ORIENTATIONS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
"""By Exif's orientation: whether to transpose, then mirror, then flip upside down."""


def sample_crop_box(
    width: int, height: int, scale: tuple[float, float], random: Random, aspect_of_view: float = 1.0
) -> Box:
    """A crop of `scale` of the area, and of an aspect from 3/4 to 4/3 of the view's (Inception's, as torchvision's
    RandomResizedCrop, which takes the aspect of squares whatever the crop is resized to).

    Args:
        aspect_of_view: width over height of what the crop is resized to: distortion stays within a third.
    """
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        aspect = aspect_of_view * math.exp(random.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(random.random() * (width - w + 1)), int(random.random() * (height - h + 1))
            return left, upper, left + w, upper + h
    return center_crop_box(width, height, (_ASPECT[0] * aspect_of_view, _ASPECT[1] * aspect_of_view))


def center_crop_box(width: int, height: int, aspect: tuple[float, float] = (1.0, 1.0)) -> Box:
    """The largest crop around the middle with an aspect (width over height) within the bounds."""
    w = min(width, round(height * aspect[1]))
    h = min(height, round(width / aspect[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


class CropPlan(NamedTuple):
    """A box of the stored image's pixels, and the flips that turn the crop upright."""

    box: Box
    reduction: int
    """1, 2, 4 or 8: decoding one of so many pixels loses no resolution; the box lies on multiples of it."""
    transpose: bool
    mirror: bool
    upside_down: bool


def plan_crop(upright: Box, width: int, height: int, orientation: int, flip: bool, size: ImageSize) -> CropPlan:
    """The plan for a box of the upright image.

    Args:
        width, height: of the stored image, before it is turned upright.
        orientation: Exif's, 1 to 8.
        flip: whether the crop is mirrored.
        size: of the resized crop, upright.
    """
    transpose, mirror, upside_down = ORIENTATIONS[orientation]
    if transpose:
        width, height = height, width
    left, upper, right, lower = stored_box(upright, width, height, orientation)
    rows, columns = both_sides(size)[::-1] if transpose else both_sides(size)
    reduction = next((r for r in (8, 4, 2) if (right - left) // r >= columns and (lower - upper) // r >= rows), 1)
    # A reduced pixel covers a whole block: a box off the block grid would be shifted by a fraction of a pixel.
    left, upper = left // reduction * reduction, upper // reduction * reduction
    right, lower = (right - left) // reduction * reduction + left, (lower - upper) // reduction * reduction + upper
    return CropPlan((left, upper, right, lower), reduction, transpose, mirror != flip, upside_down)


def stored_box(upright: Box, width: int, height: int, orientation: int) -> Box:
    """Where a box of an upright image of `width` x `height` is in the image as it is stored."""
    transpose, mirror, upside_down = ORIENTATIONS[orientation]
    left, upper, right, lower = upright
    if mirror:
        left, right = width - right, width - left
    if upside_down:
        upper, lower = height - lower, height - upper
    return (upper, left, lower, right) if transpose else (left, upper, right, lower)
