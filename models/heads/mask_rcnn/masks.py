"""Masks between images and boxes: cut out to learn from, pasted back where they were predicted."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_SAMPLES = 4
"""Along a bin's side: the share of the bin that is the object's, in 16ths."""
_AT_ONCE = 2**20
"""Pixels of a mask that are pasted at once."""
_THRESHOLD = 0.5


def masks_in_boxes(masks: Tensor, rows: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What of each box is the object's: fp32 [M, size, size], 1 in bins of which a half and more is.

    Pixels are looked up in packed masks. RoIAlign of unpacked ones, as in detectron2, would hold 32 times the bytes.

    Args:
        masks: uint8 [N, H, W / 8], 8 pixels a byte, the first in the highest bit.
        rows: int64 [M], the mask of each box.
        boxes: fp32 [M, 4].
    """
    height, width = masks.shape[1], 8 * masks.shape[2]
    steps = (torch.arange(_SAMPLES * size, device=boxes.device) + 0.5) / (_SAMPLES * size)
    low, side = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    x, y = (low + steps[:, None] * side).floor().long().unbind(-1)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    packed = masks[rows[:, None, None], y[:, :, None], (x >> 3)[:, None, :]]
    pixels = (packed >> (7 - (x & 7))[:, None, :].to(torch.uint8)) & 1
    bins = pixels.view(-1, size, _SAMPLES, size, _SAMPLES).sum((2, 4), dtype=torch.int32)
    return (2 * bins >= _SAMPLES**2).float()


def paste_mask(probabilities: Tensor, box: Tensor, height: int, width: int) -> Tensor:
    """A mask of an image, bool [height, width], where probabilities in a box reach 0.5.

    A photograph has tens of millions of pixels: beside the mask only some rows of what is in the box are held.

    Args:
        probabilities: fp32 [size, size].
        box: [4] in the image's pixels.
    """
    mask = torch.zeros(height, width, dtype=torch.bool, device=box.device)
    left, upper, right, lower = box.tolist()
    first, last = _reach(left, right, width)
    top, bottom = _reach(upper, lower, height)
    at_once = max(1, _AT_ONCE // max(1, last - first))
    for start in range(top, bottom, at_once):
        end = min(bottom, start + at_once)
        mask[start:end, first:last] = _sampled(probabilities, box, (start, end), (first, last)) >= _THRESHOLD
    return mask


def paste_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """`paste_mask` of each of n boxes [n, 4]: bool [n, height, width]."""
    masks = [paste_mask(part, box, height, width) for part, box in zip(probabilities, boxes, strict=True)]
    return torch.stack(masks) if masks else boxes.new_zeros(0, height, width, dtype=torch.bool)


def _reach(low: float, high: float, length: int) -> tuple[int, int]:
    """The pixels of a side that a box can reach, with one more at each end: outside of it no probability is 0.5."""
    first = min(length, max(0, math.floor(low) - 1))
    return first, max(first, min(length, math.ceil(high) + 1))


def _sampled(probabilities: Tensor, box: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Probabilities fp32 [h, w] at the centres of some rows and columns of pixels, 0 outside of the box."""
    y, x = (torch.arange(*pixels, device=box.device) + 0.5 for pixels in (rows, columns))
    left, top, right, bottom = box
    u, v = 2 * (x - left) / (right - left) - 1, 2 * (y - top) / (bottom - top) - 1
    grid = torch.stack([u.expand(len(v), -1), v[:, None].expand(-1, len(u))], dim=-1)
    return F.grid_sample(probabilities[None, None], grid[None], align_corners=False)[0, 0]
