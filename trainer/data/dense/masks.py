"""COCO's run-length encoded masks (RLE), by the mask API of faster-coco-eval, whose functions are pycocotools'."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mixmae.base.errors import UsageError

Rle = dict[str, Any]
"""A compressed mask: `size` [height, width] and `counts`, bytes."""
Mask = npt.NDArray[np.uint8]
"""0 or 1, [height, width]."""
_REACH = 10
"""A polygon's points lie within so many times the image's longer side: rasterising takes as long as its edges are."""


def require_mask_api() -> None:
    """Raises UsageError where the package for masks is not installed."""
    try:
        _api()
    except ImportError as error:
        raise UsageError("objects need faster-coco-eval; install it with: pip install 'mixmae[detection]'") from error


def rle_of(segmentation: Any, height: int, width: int) -> Rle:
    """The compressed mask of a COCO segmentation: polygons, or RLE as a list of runs or compressed.

    Raises:
        ValueError: it is none, its points lie far outside of the image, or it is of another size than the image.
    """
    api = _api()
    if isinstance(segmentation, list):
        polygons = [one for one in segmentation if len(one) >= 6 and len(one) % 2 == 0]
        if not polygons:
            return encode(np.zeros((height, width), np.uint8))
        if not all(_is_near(value, max(height, width)) for polygon in polygons for value in polygon):
            raise ValueError("a polygon's points are no numbers, or far outside of the image")
        merged: Rle = api.merge(api.frPyObjects(polygons, height, width))
        return merged
    counts, size = segmentation["counts"], segmentation["size"]
    if list(size) != [height, width]:
        raise ValueError(f"a mask of {size[0]} x {size[1]} pixels, of an image of {height} x {width}")
    if isinstance(counts, list):
        rle: Rle = api.frPyObjects([{"size": [height, width], "counts": counts}], height, width)[0]
    else:
        rle = {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    decode(rle)  # raises for runs that are not as long as the image
    return rle


def _is_near(value: Any, side: int) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= _REACH * side


def encode(mask: npt.NDArray[Any]) -> Rle:
    """A mask [height, width], compressed."""
    rle: Rle = _api().encode(np.asfortranarray(mask, dtype=np.uint8))
    return rle


def decode(rle: Rle) -> Mask:
    mask: Mask = _api().decode(rle)
    return mask


def area(rle: Rle) -> int:
    """Pixels of a mask."""
    return int(_api().area(rle))


def box_of(rle: Rle) -> tuple[int, int, int, int]:
    """Left, upper, right, lower: the smallest box around a mask's pixels, the last two behind them."""
    x, y, w, h = map(int, _api().toBbox(rle))
    return x, y, x + w, y + h


def _api() -> Any:
    from faster_coco_eval.core import mask

    return mask
