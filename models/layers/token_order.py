"""The order in which a stage keeps its tokens, so that what attends to each other lies side by side.

Everything in a block but its attention works on single tokens and does not care for their order. So a stage sorts its
tokens once, by window or, where a window is the whole map, by group; its blocks never move them; the grid's order comes
back for the next stage. Sorted by group, attention is K dense problems of about L / K tokens in place of one of L with
a mask: work and memory fall by K.

Shapes: L = H * W tokens of a stage; a problem is `size` tokens that attend to each other; h heads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmae.models.methods.mixing import group_sizes, upsample_groups

# Product of a query's code with a key's code of another group. Scaled by 1/sqrt(d) it still drives exp() to exactly 0
# in every dtype that has fp32's range.
_INVISIBLE = -1e4
# Codes are padded to this width: K is at most 5, and fused kernels want head widths that are multiples of 8.
_CODE_WIDTH = 8


class Problems(NamedTuple):
    """`num` attention problems of `size` tokens each, side by side in a stage's order.

    pairs: [size * size] for all problems, or [num, size * size] for each: the rows of the bias table for all pairs of
        query and key.
    bias: [num, 1, size, size], 0 within a group and -inf across, where one map is shared by the micro-batch.
    query_codes, key_codes: [B, num, 1, size, 8] where each sample has its own map: extra head dimensions whose
        product is 0 within a group and hugely negative across, so that no mask for each sample is ever made.
    members: int32 [1 or B, num, size], the group of each token, for a kernel that compares them itself: then there is
        neither a bias nor codes.
    """

    num: int
    size: int
    pairs: Tensor
    bias: Tensor | None = None
    query_codes: Tensor | None = None
    key_codes: Tensor | None = None
    members: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.num * self.size

    @property
    def is_shared(self) -> bool:
        """Whether problems have the same positions, and so the same bias."""
        return self.pairs.dim() == 1 or len(self.pairs) == 1

    @property
    def are_windows(self) -> bool:
        """Whether problems are whole windows, each row by row."""
        return self.pairs.dim() == 1

    @property
    def is_dense(self) -> bool:
        """Whether all tokens of a problem see each other."""
        return self.bias is None and self.query_codes is None and self.members is None


class Arrangement(NamedTuple):
    """The order of a stage's tokens, and the attention problems in that order.

    problems: of attention.
    order: [L], the grid position of each token; None if that is tile by tile.
    place: [L], where each grid position went; the inverse of `order`.
    tile: tokens along a tile's sides, without an `order`; None if it is the grid's own.
    """

    problems: tuple[Problems, ...] = ()
    order: Tensor | None = None
    place: Tensor | None = None
    tile: tuple[int, int] | None = None

    def sort(self, grid: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, L, C] in the stage's order."""
        if self.order is not None:
            return _Permuted.apply(grid.flatten(1, 2), self.order, self.place)
        return grid.flatten(1, 2) if self.tile is None else to_tiles(grid, self.tile).flatten(1, 2)

    def restore(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, L, C] -> [B, H, W, C]."""
        if self.order is not None:
            return _Permuted.apply(tokens, self.place, self.order).unflatten(1, grid)
        if self.tile is None:
            return tokens.unflatten(1, grid)
        height, width = self.tile
        tiles = tokens.unflatten(1, (grid[0] // height, grid[1] // width, height, width))
        return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class _Permuted(torch.autograd.Function):
    """Rows in another order. Its gradient is again a gather; that of torch's own indexing adds into zeros."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return tokens.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return gradients[0].index_select(1, place), None, None


def by_window(grid: tuple[int, int], window: int, pairs: Tensor) -> Arrangement:
    """Tokens window by window, unmixed.

    Args:
        pairs: those of `relative_position_index(window)`.
    """
    height, width = grid
    problems = Problems((height // window) * (width // window), window * window, pairs)
    return Arrangement((problems,), tile=None if grid == (window, window) else (window, window))


def separated(
    arrangement: Arrangement, groups: Tensor, grid: tuple[int, int], dtype: torch.dtype, by_members: bool = False
) -> Arrangement:
    """The same order of windows, with groups kept apart by a mask or by codes.

    Args:
        groups: [Gh, Gw] or [B, Gh, Gw].
        dtype: of the tokens.
        by_members: for a kernel that compares members itself.
    """
    (windows,) = arrangement.problems
    members = upsample_groups(groups, grid)
    if arrangement.tile is not None:
        members = to_tiles(members.view(-1, *grid, 1), arrangement.tile).view(*groups.shape[:-2], -1)
    members = members.view(*groups.shape[:-2], windows.num, windows.size)
    if by_members:
        members = members.view(-1, windows.num, windows.size).int()
        return arrangement._replace(problems=(windows._replace(members=members),))
    if groups.dim() == 2:
        same = members[:, :, None] == members[:, None, :]
        bias = torch.zeros(same.shape, dtype=dtype, device=groups.device).masked_fill_(~same, float("-inf"))
        return arrangement._replace(problems=(windows._replace(bias=bias[:, None]),))
    own = F.one_hot(members, _CODE_WIDTH).to(dtype)[:, :, None]
    return arrangement._replace(problems=(windows._replace(query_codes=own, key_codes=(1 - own) * _INVISIBLE),))


def by_group(groups: Tensor, num_groups: int, grid: tuple[int, int], pairs: Tensor) -> Arrangement:
    """Tokens group by group, for a stage whose window is the whole map and a map [Gh, Gw] of `draw_mix`.

    Groups of one size stand together, as one batch of problems.
    """
    members = upsample_groups(groups, grid).flatten()
    counts = token_counts(num_groups, groups.shape, grid)
    if groups.device.type == "cpu":
        sizes = [size for count, size in counts for _ in range(count)]
        assert members.bincount().tolist() == sizes, f"groups are not of {sizes} tokens"
    order = members.argsort(stable=True)
    pairs = pairs.view(len(order), len(order))
    problems, start = [], 0
    for count, size in counts:
        own = order[start : start + count * size].view(count, size)
        problems.append(Problems(count, size, pairs[own[:, :, None], own[:, None, :]].flatten(1)))
        start += count * size
    return Arrangement(tuple(problems), order, order.argsort())


def of_kept(
    kept: Tensor, cells: tuple[int, int], grid: tuple[int, int], window: int, pairs: Tensor, dtype: torch.dtype
) -> Arrangement:
    """Tokens of some cells, cell by cell, that see each other inside windows; others are not there.

    They are one problem. Where a window is not the whole map, a mask hides what lies in other windows: in such stages a
    window holds now more of them and now fewer, and shapes shall not depend on what is kept.

    Args:
        kept: [n], cells counted row by row.
        pairs: those of `relative_position_index(window)`.
        dtype: of the tokens.
    """
    rows, cols = grid[0] // cells[0], grid[1] // cells[1]
    row = (kept // cells[1] * rows)[:, None, None] + torch.arange(rows, device=kept.device)[:, None]
    col = (kept % cells[1] * cols)[:, None, None] + torch.arange(cols, device=kept.device)
    inside = (row % window * window + col % window).flatten()
    pairs = pairs.view(window**2, window**2)[inside[:, None], inside]
    problems = Problems(1, len(inside), pairs.flatten()[None])
    if grid != (window, window):
        number = (row // window * (grid[1] // window) + col // window).flatten()
        same = number[:, None] == number
        bias = torch.zeros(same.shape, dtype=dtype, device=kept.device).masked_fill_(~same, float("-inf"))
        problems = problems._replace(bias=bias[None, None])
    return Arrangement((problems,))


def token_counts(num_groups: int, cells: Sequence[int], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(number of groups, tokens in each), one entry for each size, in the order of the groups."""
    per_cell = (grid[0] // cells[0]) * (grid[1] // cells[1])
    sizes = [size * per_cell for size in group_sizes(num_groups, cells[0] * cells[1])]
    return [(sizes.count(size), size) for size in dict.fromkeys(sizes)]


def to_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """[B, H, W, C] -> [B, tiles, h * w, C], row by row."""
    x = x.unflatten(2, (-1, tile[1])).unflatten(1, (-1, tile[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def to_windows(x: Tensor, window: int) -> Tensor:
    """[..., H, W, C] -> [..., Wn, N, C]."""
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height // window, window, width // window, window, channels)
    return x.transpose(-4, -3).reshape(*lead, -1, window * window, channels)


def nearest_window(grid: tuple[int, int], wanted: int) -> int:
    """The window side nearest to the wanted one, and the larger of two, that divides a token grid."""
    fits = [side for side in range(1, min(grid) + 1) if grid[0] % side == 0 and grid[1] % side == 0]
    return min(fits, key=lambda side: (abs(side - wanted), -side))


def relative_position_index(window: int) -> Tensor:
    """[N*N] rows of the bias table [(2w-1)^2, h]: query-minus-key offset, row-major (Swin, section 3.2)."""
    axis = torch.arange(window)
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
    offset = position[:, :, None] - position[:, None, :] + window - 1
    return (offset[0] * (2 * window - 1) + offset[1]).flatten()
