"""Masks between images and boxes: cut out to learn from, pasted back where they were predicted."""

import torch
import torch.nn.functional as F
from torch import Tensor

_SAMPLES = 4
"""Along a bin's side: the share of the bin that is the object's, in 16ths."""
_AT_ONCE = 2**25
"""Pixels of masks that are pasted at once."""


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


def paste_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> Tensor:
    """Masks of an image, bool [n, height, width], where probabilities in boxes reach the threshold.

    Args:
        probabilities: fp32 [n, size, size].
        boxes: [n, 4] in the image's pixels.
    """
    at_once = max(1, _AT_ONCE // (height * width))
    pairs = zip(probabilities.split(at_once), boxes.split(at_once), strict=True)
    parts = [_pasted(part, own, height, width) >= threshold for part, own in pairs]
    return torch.cat(parts) if parts else boxes.new_zeros(0, height, width, dtype=torch.bool)


def _pasted(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """fp32 [n, height, width], 0 outside boxes."""
    x, y = (torch.arange(length, device=boxes.device) + 0.5 for length in (width, height))
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    left, top = low.unbind(-1)
    right, bottom = high.unbind(-1)
    u, v = 2 * (x - left) / (right - left) - 1, 2 * (y - top) / (bottom - top) - 1
    grid = torch.stack([u[:, None, :].expand(-1, height, -1), v[:, :, None].expand(-1, -1, width)], dim=-1)
    return F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0]
