"""A segmenter on whole images of any size: in windows of the size that it was trained on, which overlap."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_CLASSES_AT_ONCE = 16
"""Classes whose logits are resized to an image's own size at once: 150 of a photograph are gigabytes."""
Windows = Callable[[Tensor], Tensor]
"""Normalised images [B, 3, size, size] to logits [B, classes, size, size]."""


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side, the last one at its end; one at 0 where the side is no longer than a window."""
    count = max(0, -(-(side - window) // stride)) + 1
    return [max(0, min(number * stride, side - window)) for number in range(count)]


def count_windows(height: int, width: int, window: int, stride: int) -> int:
    return len(starts(height, window, stride)) * len(starts(width, window, stride))


def sliding_logits(
    segment: Windows, image: Tensor, window: int, stride: int, batch: int, passes: int | None = None
) -> Tensor:
    """Logits fp32 [classes, H, W] of a normalised image [3, H, W], where windows overlap their mean.

    An image that is smaller than a window is filled up with the mean colour.

    Args:
        batch: windows at once; each pass has so many.
        passes: how often `segment` is called, if more than are needed: as often on each rank.
    """
    height, width = image.shape[1:]
    padded = F.pad(image, (0, max(0, window - width), 0, max(0, window - height)))
    corners = [(top, left) for top in starts(height, window, stride) for left in starts(width, window, stride)]
    needed = -(-len(corners) // batch)
    corners += corners[:1] * (max(needed, passes or 0) * batch - len(corners))
    total: Tensor | None = None
    count = torch.zeros(padded.shape[1:], device=image.device)
    for number, (top, left, logits) in enumerate(_windows(segment, padded, corners, window, batch)):
        if number >= count_windows(height, width, window, stride):
            continue
        total = logits.new_zeros(len(logits), *padded.shape[1:]) if total is None else total
        total[:, top : top + window, left : left + window] += logits
        count[top : top + window, left : left + window] += 1
    assert total is not None
    return (total / count)[:, :height, :width]


def _windows(
    segment: Windows, image: Tensor, corners: list[tuple[int, int]], window: int, batch: int
) -> Iterator[tuple[int, int, Tensor]]:
    for first in range(0, len(corners), batch):
        part = corners[first : first + batch]
        views = [image[:, top : top + window, left : left + window] for top, left in part]
        for (top, left), logits in zip(part, segment(torch.stack(views)), strict=True):
            yield top, left, logits


def classes_of(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of each pixel, uint8 [H, W], of logits [classes, h, w] resized (bilinear) to another size."""
    best = torch.full(size, -torch.inf, device=logits.device)
    found = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for first in range(0, len(logits), _CLASSES_AT_ONCE):
        part = logits[None, first : first + _CLASSES_AT_ONCE]
        values, numbers = F.interpolate(part, size, mode="bilinear", align_corners=False)[0].max(0)
        better = values > best
        found = torch.where(better, (numbers + first).to(torch.uint8), found)
        best = torch.where(better, values, best)
    return found
