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

    pairs: [1 or num, size * size], the rows of the bias table for all pairs of query and key.
    bias: [num, 1, size, size], 0 within a group and -inf across, where one map is shared by the micro-batch.
    query_codes, key_codes: [B, num, 1, size, 8] where each sample has its own map: extra head dimensions whose
        product is 0 within a group and hugely negative across, so that no mask for each sample is ever made.
    """

    num: int
    size: int
    pairs: Tensor
    bias: Tensor | None = None
    query_codes: Tensor | None = None
    key_codes: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.num * self.size

    @property
    def is_dense(self) -> bool:
        """Whether all tokens of a problem see each other."""
        return self.bias is None and self.query_codes is None


class Arrangement(NamedTuple):
    """The order of a stage's tokens, and the attention problems in that order.

    order: [L], the grid position of each token; None if that is the grid's own order.
    place: [L], where each grid position went; the inverse of `order`.
    """

    order: Tensor | None
    place: Tensor | None
    problems: tuple[Problems, ...]

    def sort(self, grid: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, L, C] in the stage's order."""
        tokens = grid.flatten(1, 2)
        return tokens if self.order is None else _Permuted.apply(tokens, self.order, self.place)

    def restore(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, L, C] -> [B, H, W, C]."""
        if self.order is not None:
            tokens = _Permuted.apply(tokens, self.place, self.order)
        return tokens.unflatten(1, grid)


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


def window_order(grid: tuple[int, int], window: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """`order` and `place` of tokens window by window; None where that is the grid's own order."""
    height, width = grid
    if (height, width) == (window, window):
        return None
    position = torch.arange(height * width, device=device).view(height, width, 1)
    order = to_windows(position, window).flatten()
    return order, order.argsort()


def by_window(
    grid: tuple[int, int], window: int, pairs: Tensor, order_and_place: tuple[Tensor, Tensor] | None
) -> Arrangement:
    """Tokens window by window, unmixed.

    Args:
        pairs: those of `relative_position_index(window)`.
        order_and_place: those of `window_order`.
    """
    height, width = grid
    problems = Problems((height // window) * (width // window), window * window, pairs[None])
    order, place = order_and_place or (None, None)
    return Arrangement(order, place, (problems,))


def separated(arrangement: Arrangement, groups: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Arrangement:
    """The same order of windows, with groups kept apart by a mask or by codes.

    Args:
        groups: [Gh, Gw] or [B, Gh, Gw].
        dtype: of the tokens.
    """
    (windows,) = arrangement.problems
    members = upsample_groups(groups, grid).flatten(-2)
    if arrangement.order is not None:
        members = members.index_select(-1, arrangement.order)
    members = members.unflatten(-1, (windows.num, windows.size))
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
    return Arrangement(order, order.argsort(), tuple(problems))


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
    return Arrangement(None, None, (problems,))


def token_counts(num_groups: int, cells: Sequence[int], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(number of groups, tokens in each), one entry for each size, in the order of the groups."""
    per_cell = (grid[0] // cells[0]) * (grid[1] // cells[1])
    sizes = [size * per_cell for size in group_sizes(num_groups, cells[0] * cells[1])]
    return [(sizes.count(size), size) for size in dict.fromkeys(sizes)]


def to_windows(x: Tensor, window: int) -> Tensor:
    """[..., H, W, C] -> [..., Wn, N, C]."""
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height // window, window, width // window, window, channels)
    return x.transpose(-4, -3).reshape(*lead, -1, window * window, channels)


def relative_position_index(window: int) -> Tensor:
    """[N*N] rows of the bias table [(2w-1)^2, h]: query-minus-key offset, row-major (Swin, section 3.2)."""
    axis = torch.arange(window)
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
    offset = position[:, :, None] - position[:, None, :] + window - 1
    return (offset[0] * (2 * window - 1) + offset[1]).flatten()
