"""Anchors: the boxes that a region proposal network starts from, at every position of every level."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SIZES = (32, 64, 128, 256, 512)
"""Pixels, a size for each level."""
RATIOS = (0.5, 1.0, 2.0)
"""Height over width."""
STRIDES = (4, 8, 16, 32, 64)


def anchors_of(height: int, width: int) -> list[Tensor]:
    """Of an image: fp32 [h * w * ratios, 4] for each level, row by row, the ratios of a position side by side.

    Centres are at multiples of the stride, and sides are not rounded, as in detectron2 (torchvision rounds them).
    """
    return [
        _level(level_grid((height, width), stride), stride, size) for stride, size in zip(STRIDES, SIZES, strict=True)
    ]


def level_grid(image: tuple[int, int], stride: int) -> tuple[int, int]:
    """Rows and columns of a level; the coarsest one takes every second position of the one before."""
    return -(-image[0] // stride), -(-image[1] // stride)


def _level(grid: Sequence[int], stride: int, size: int) -> Tensor:
    rows, columns = (torch.arange(count) * float(stride) for count in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centers = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
    return (centers + _around_zero(size)).view(-1, 4)


def _around_zero(size: int) -> Tensor:
    halves = [(size / math.sqrt(ratio) / 2, size * math.sqrt(ratio) / 2) for ratio in RATIOS]
    return torch.tensor([(-w, -h, w, h) for w, h in halves])
