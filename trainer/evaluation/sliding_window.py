"""A segmenter on whole images of any size: in windows of the size that it was trained on, which overlap."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmae.base.image_size import ImageSize, both_sides

_CLASSES_AT_ONCE = 16
"""Classes whose logits are resized to an image's own size at once: 150 of a photograph are gigabytes."""
Windows = Callable[[Tensor], Tensor]
"""Normalised images [B, 3, H, W], of a window's size, to logits [B, classes, H, W]."""


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side, the last one at its end; one at 0 where the side is no longer than a window."""
    count = max(0, -(-(side - window) // stride)) + 1
    return [max(0, min(number * stride, side - window)) for number in range(count)]


def count_windows(height: int, width: int, window: ImageSize, stride: ImageSize) -> int:
    return len(_corners(height, width, both_sides(window), both_sides(stride)))


def _corners(height: int, width: int, window: tuple[int, int], stride: tuple[int, int]) -> list[tuple[int, int]]:
    """Top and left of each window."""
    rows, columns = starts(height, window[0], stride[0]), starts(width, window[1], stride[1])
    return [(top, left) for top in rows for left in columns]


def sliding_logits(
    segment: Windows, image: Tensor, window: ImageSize, stride: ImageSize, batch: int, passes: int | None = None
) -> Tensor:
    """Logits fp32 [classes, H, W] of a normalised image [3, H, W], where windows overlap their mean.

    An image that is smaller than a window is filled up with the mean colour.

    Args:
        batch: windows at once; each pass has so many.
        passes: how often `segment` is called, if more than are needed: as often on each rank.
    """
    height, width = image.shape[1:]
    rows, columns = both_sides(window)
    padded = F.pad(image, (0, max(0, columns - width), 0, max(0, rows - height)))
    corners = _corners(height, width, (rows, columns), both_sides(stride))
    count_of_windows, needed = len(corners), -(-len(corners) // batch)
    corners += corners[:1] * (max(needed, passes or 0) * batch - len(corners))
    total: Tensor | None = None
    count = torch.zeros(padded.shape[1:], device=image.device)
    for number, (top, left, logits) in enumerate(_windows(segment, padded, corners, (rows, columns), batch)):
        if number >= count_of_windows:
            continue
        total = logits.new_zeros(len(logits), *padded.shape[1:]) if total is None else total
        total[:, top : top + rows, left : left + columns] += logits
        count[top : top + rows, left : left + columns] += 1
    assert total is not None
    return (total / count)[:, :height, :width]


def _windows(
    segment: Windows, image: Tensor, corners: list[tuple[int, int]], window: tuple[int, int], batch: int
) -> Iterator[tuple[int, int, Tensor]]:
    for first in range(0, len(corners), batch):
        part = corners[first : first + batch]
        views = [image[:, top : top + window[0], left : left + window[1]] for top, left in part]
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
