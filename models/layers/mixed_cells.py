"""Cells of mixed maps, and what each sees of its neighbours: positions of its own group.

Groups are whole cells, so that all positions of a cell have the same inputs: the cell with a halo of its eight
neighbours, where those of other groups are blank.

Maps are [B, H, W, C]; Gh*Gw cells of h*w positions; b is 1 for a map of groups that the micro-batch shares, or B.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mix(NamedTuple):
    """What cells share.

    neighbours: bool [b, Gh, Gw, 3, 3], whether the cells around, and the cell itself, are there and of its group.
    shares: fp32 [b, Gh*Gw, Gh*Gw], the weight of each cell (last) in the mean over a cell's group.
    """

    neighbours: Tensor
    shares: Tensor

    @classmethod
    def of(cls, groups: Tensor) -> "Mix":
        """For groups [Gh, Gw] or [B, Gh, Gw]."""
        groups = groups.view(-1, *groups.shape[-2:])
        around = F.pad(groups, (1, 1, 1, 1), value=-1).unfold(1, 3, 1).unfold(2, 3, 1)
        flat = groups.flatten(1)
        same = (flat[:, :, None] == flat[:, None, :]).float()
        return cls(around == groups[..., None, None], same / same.sum(-1, keepdim=True))

    @property
    def cells(self) -> tuple[int, int]:
        return (self.neighbours.shape[1], self.neighbours.shape[2])


class Tiles(torch.autograd.Function):
    """Cells with halos, [B, Gh, Gw, before + h + after, before + w + after, C].

    Of `before` positions above and to the left and `after` ones below and to the right; `fill` stands where the
    neighbour is none, or of another group. The gradient is written out since that of torch's unfolding is slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, neighbours: Tensor, before: int, after: int, fill: float) -> Tensor:
        ctx.save_for_backward(neighbours)
        ctx.halo = (before, after)
        cells = _cells(x, neighbours)
        batch, rows, cols, height, width, dim = cells.shape
        out = x.new_empty(batch, rows, cols, before + height + after, before + width + after, dim)
        out[:, :, :, before : before + height, before : before + width] = cells
        out[:, 0, :, :before] = out[:, -1, :, before + height :] = fill
        out[:, :, 0, :, :before] = out[:, :, -1, :, before + width :] = fill
        for to, source, same in _halo(neighbours, (height, width), before, after):
            out[to] = _seen(cells[source], same, fill)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (neighbours,) = ctx.saved_tensors
        before, after = ctx.halo
        (grad,) = gradients
        batch, rows, cols, height, width, dim = grad.shape
        height, width = height - before - after, width - before - after
        out = grad.new_empty(batch, rows * height, cols * width, dim)
        cells = _cells(out, neighbours)
        cells.copy_(grad[:, :, :, before : before + height, before : before + width])
        for to, source, same in _halo(neighbours, (height, width), before, after):
            cells[source] += _seen(grad[to], same, 0.0)
        return out, None, None, None, None


def _seen(x: Tensor, same: Tensor, fill: float) -> Tensor:
    """Finite values where they are of the cell's group, elsewhere `fill`: 0, or minus infinity.

    By arithmetic, several times as fast as a choice whose condition is the same along a cell.
    """
    if fill == 0:
        return x * same.to(x.dtype)
    return x + torch.zeros_like(same, dtype=x.dtype).masked_fill_(~same, fill)


def _cells(x: Tensor, neighbours: Tensor) -> Tensor:
    """A view [B, Gh, Gw, h, w, C] of a contiguous map."""
    rows, cols = neighbours.shape[1:3]
    batch, height, width, dim = x.shape
    return x.view(batch, rows, height // rows, cols, width // cols, dim).transpose(2, 3)


def _halo(
    neighbours: Tensor, cell: tuple[int, int], before: int, after: int
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], Tensor]]:
    """For each neighbour: where its part of the halo lies in a tile, where in the neighbour, and whether it is seen."""

    def along(side: int, step: int) -> tuple[slice, slice, slice, slice]:
        """Cells that have such a neighbour, the neighbours, the halo's positions in the tile and in the neighbour."""
        if step < 0:
            return slice(1, None), slice(None, -1), slice(0, before), slice(side - before, side)
        if step > 0:
            return slice(None, -1), slice(1, None), slice(before + side, None), slice(0, after)
        return slice(None), slice(None), slice(before, before + side), slice(None)

    steps = [step for step, width in ((-1, before), (0, 1), (1, after)) if width]
    for dy, dx in product(steps, steps):
        if (dy, dx) != (0, 0):
            row, next_row, to_y, from_y = along(cell[0], dy)
            col, next_col, to_x, from_x = along(cell[1], dx)
            everything = slice(None)
            same = neighbours[:, row, col, dy + 1, dx + 1, None, None, None]
            yield (everything, row, col, to_y, to_x), (everything, next_row, next_col, from_y, from_x), same


def join_cells(tiles: Tensor, cells: tuple[int, int]) -> Tensor:
    """[B*Gh*Gw, C, h, w] -> [B, Gh*h, Gw*w, C]."""
    x = tiles.permute(0, 2, 3, 1).unflatten(0, (-1, *cells)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)
