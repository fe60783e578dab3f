"""Attention without a position bias, among tokens that lie cell by cell or window by window.

A stage's H*W tokens are Gh*Gw cells of r*r tokens. Sorted cell by cell, with the cells of one group side by side, the
attention of K groups is K dense problems, with or without keys that stand for a whole cell each; and a convolution
whose kernel is a cell, as PVT and Twins sub-sample keys, is a product of matrices.

Shapes: L = H*W tokens; h heads of width d; a unit is what a problem is counted in, a cell or, in windows, a token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models.layers.token_order import Arrangement, to_tiles, token_counts
from mixmae.models.methods.mixing import upsample_groups
from mixmae.models.ops import sdpa


class Layout(NamedTuple):
    """The order of a stage's tokens, and the attention problems that lie side by side in it.

    arrangement: sorts a map into this order and restores it.
    problems: (number of problems, units of each), one entry for each size.
    mask: [1 or B * number, 1, queries, keys], 0 within a group and -inf across; None where problems are dense.
    """

    arrangement: Arrangement
    problems: tuple[tuple[int, int], ...]
    mask: Tensor | None = None


def dense(units: int) -> Layout:
    """Tokens in the order they have, all of which see each other."""
    return Layout(Arrangement(), ((1, units),))


def by_cell(
    grid: tuple[int, int],
    cells: tuple[int, int],
    groups: Tensor | None = None,
    num_groups: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Layout:
    """For attention over the whole of a map.

    Args:
        grid: H, W of the map.
        cells: Gh, Gw.
        groups: [Gh, Gw] or [B, Gh, Gw].
        num_groups: K, for maps of `draw_mix`; without it, and with a map for each sample, a mask keeps groups apart.
        dtype: of the map.
    """
    rows, cols = grid[0] // cells[0], grid[1] // cells[1]
    number = cells[0] * cells[1]
    arrangement = Arrangement(tile=(rows, cols) if rows * cols > 1 else None)
    if groups is None:
        return Layout(arrangement, ((1, number),))
    if groups.dim() == 2 and num_groups is not None:
        position = torch.arange(grid[0] * grid[1], device=groups.device).view(1, *grid, 1)
        return _grouped(to_tiles(position, (rows, cols)).view(number, rows * cols), groups, num_groups)
    member = groups.flatten(-2).view(-1, 1, number)
    mask = _mask(member[..., :, None] == member[..., None, :], dtype)
    return Layout(arrangement, ((1, number),), mask.repeat_interleave(rows * cols, dim=2))


def by_window(
    grid: tuple[int, int],
    window: int,
    groups: Tensor | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Layout:
    """For attention inside windows of side `window`, which need not end where cells do.

    Args:
        grid: H, W of the map, multiples of `window`.
        groups: [Gh, Gw] or [B, Gh, Gw].
        batch: B; with `dtype` what the map has.
    """
    number = grid[0] * grid[1] // window**2
    arrangement = Arrangement(tile=None if grid == (window, window) else (window, window))
    mask = None
    if groups is not None:
        members = upsample_groups(groups, grid).expand(batch, *grid)[..., None]
        member = to_tiles(members, (window, window)).flatten(0, 1)[:, None, :, 0]
        mask = _mask(member[..., :, None] == member[..., None, :], dtype)
    return Layout(arrangement, ((number, window**2),), mask)


def _grouped(position: Tensor, groups: Tensor, num_groups: int) -> Layout:
    """Cells group by group; `position` [cells, tokens of a cell] says where tokens lie in the map."""
    counts = tuple(token_counts(num_groups, groups.shape, (groups.shape[0], groups.shape[1])))
    if groups.device.type == "cpu":
        sizes = [size for count, size in counts for _ in range(count)]
        assert groups.flatten().bincount().tolist() == sizes, f"groups are not of {sizes} cells"
    order = position.index_select(0, groups.flatten().argsort(stable=True)).flatten()
    return Layout(Arrangement((), order, order.argsort()), counts)


def _mask(same: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(same.shape, dtype=dtype, device=same.device).masked_fill_(~same, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """[B, L, h*d] for queries [B, L, h, d] and keys and values [B, L, h, d] or, one for each cell, [B, Gh*Gw, h, d]."""
    if len(layout.problems) == 1:
        return _attend(q, k, v, layout.problems[0][0], layout.mask)
    units = sum(count * size for count, size in layout.problems)
    out, start = [], 0
    for count, size in layout.problems:
        queries, keys, values = (_units(x, units, start, count * size) for x in (q, k, v))
        out.append(_attend(queries, keys, values, count, layout.mask))
        start += count * size
    return torch.cat(out, dim=1)


def _units(x: Tensor, units: int, start: int, number: int) -> Tensor:
    """Tokens of the units from `start` on."""
    per_unit = x.shape[1] // units
    return x.narrow(1, start * per_unit, number * per_unit)


def _attend(q: Tensor, k: Tensor, v: Tensor, count: int, mask: Tensor | None) -> Tensor:
    """`count` problems of one size, side by side in tokens."""
    queries, keys, values = (x.unflatten(1, (count, -1)).flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    out = sdpa.attend_unbiased(queries, keys, values, mask)
    return out.transpose(1, 2).flatten(2).unflatten(0, (-1, count)).flatten(1, 2)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens in a layout."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(attend(q, k, v, layout))


class SubsampledAttention(nn.Module):
    """Attention of all tokens to one key and value for each cell (PVT section 3.3; Twins-SVT section 3.2).

    Args:
        reduction: tokens along a cell's side; with 1 there is nothing to reduce.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = CellConv2d(dim, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[B, L, C] -> [B, L, C], cell by cell."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        if self.sr is not None and self.norm is not None:
            x = self.norm(self.sr(x))
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(attend(q, k, v, layout))


class CellConv2d(nn.Conv2d):
    """A convolution whose kernel and stride are a cell, of tokens that lie cell by cell: one product of matrices."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__(dim, dim, side, side)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Gh*Gw*r*r, C] -> [B, Gh*Gw, C]."""
        per_cell = self.kernel_size[0] * self.kernel_size[1]
        x = x.unflatten(1, (-1, per_cell)).flatten(2)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError unless heads divide the width."""
    if dim % num_heads:
        raise ValueError(f"embed dim {dim} does not divide into {num_heads} heads")
