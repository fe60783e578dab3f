"""Boxes [..., 4] as corners x1, y1, x2, y2 in pixels, in fp32, and how networks regress them."""

import math

import torch
from torch import Tensor

MIN_SIZE = 1e-3
"""Pixels; of a smaller side there is no logarithm worth learning."""
_LARGEST_STEP = math.log(1000 / 16)
"""By which a side may grow at most, as a logarithm (Detectron)."""
Weights = tuple[float, float, float, float]


def encode_boxes(target: Tensor, boxes: Tensor, weights: Weights) -> Tensor:
    """What takes each box to its target: shifts over the box's sides, logarithms of growth (R-CNN, arXiv 1311.2524).

    Args:
        target, boxes: [..., 4].
        weights: of the four numbers.
    """
    center, size = _center_and_size(boxes)
    target_center, target_size = _center_and_size(target)
    wx, wy, ww, wh = weights
    dx, dy = ((target_center - center) / size).unbind(-1)
    dw, dh = (target_size / size).log().unbind(-1)
    return torch.stack([wx * dx, wy * dy, ww * dw, wh * dh], dim=-1)


def decode_boxes(deltas: Tensor, boxes: Tensor, weights: Weights) -> Tensor:
    """The boxes that `encode_boxes` was given as targets; deltas and boxes [..., 4], broadcast against each other."""
    center, size = _center_and_size(boxes)
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True))
    growth = torch.stack([dw, dh], dim=-1).clamp(max=_LARGEST_STEP).exp()
    new_center, half = center + torch.stack([dx, dy], dim=-1) * size, size * growth / 2
    return torch.cat([new_center - half, new_center + half], dim=-1)


def _center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    size = high - low
    return low + size / 2, size.clamp(min=MIN_SIZE)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [B, ..., 4] inside images of `sizes` [B, 2] (height, width)."""
    limits = sizes.flip(-1).repeat(1, 2).to(boxes.dtype).view(len(sizes), *[1] * (boxes.dim() - 2), 4)
    return boxes.clamp(min=0).minimum(limits)


def usable(boxes: Tensor) -> Tensor:
    """Which boxes are finite and not empty, bool [...]."""
    return boxes.isfinite().all(-1) & (boxes[..., 2:] - boxes[..., :2] >= MIN_SIZE).all(-1)
