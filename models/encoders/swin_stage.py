"""A stage of the Swin encoders: blocks that share an arrangement of tokens, by window or by group of mixed images."""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from mixmae.models.encoders.contract import unchanged
from mixmae.models.encoders.staged import Stage
from mixmae.models.layers.blocks import Block, PatchMerging
from mixmae.models.layers.token_order import (
    Arrangement,
    by_group,
    by_window,
    of_kept,
    relative_position_index,
    separated,
)
from mixmae.models.layers.window_attention import WindowAttention


class SwinStage(Stage):
    """Patch merging (but for the first stage), then blocks that share one arrangement of tokens, or two of them.

    Args:
        wide_window: window side of `wide_blocks`, counted from 1; None where all blocks have one.
    """

    relative_position_index: Tensor
    wide_position_index: Tensor

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window: int,
        grid: tuple[int, int],
        mlp_ratio: float,
        drop_path: Sequence[float],
        merge: bool,
        wide_window: int | None = None,
        wide_blocks: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.grid = grid
        self.window, self.wide_window = window, wide_window
        self.wide = [wide_window is not None and number in wide_blocks for number in range(1, depth + 1)]
        self.merge = merge
        self.downsample = PatchMerging(dim // 2) if merge else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(dim, WindowAttention(dim, num_heads, self._window(self.wide[i])), mlp_ratio, drop_path[i])
            for i in range(depth)
        )
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        if wide_window is not None:
            self.register_buffer("wide_position_index", relative_position_index(wide_window), persistent=False)

    def _window(self, wide: bool) -> int:
        return self.wide_window if wide and self.wide_window is not None else self.window

    def _position_index(self, wide: bool) -> Tensor:
        return self.wide_position_index if wide else self.relative_position_index

    def set_grid(self, grid: tuple[int, int], window: int, wide_window: int | None = None) -> None:
        """Another token grid and window sides; bias tables are resized."""
        device = self.relative_position_index.device
        self.grid, self.window, self.wide_window = grid, window, wide_window
        self.relative_position_index = relative_position_index(window).to(device)
        if wide_window is not None:
            self.wide_position_index = relative_position_index(wide_window).to(device)
        for block, wide in zip(self.blocks, self.wide, strict=True):
            assert isinstance(block, Block)
            assert isinstance(block.attn, WindowAttention)
            block.attn.set_window(self._window(wide))

    def _runs(self) -> Iterator[tuple[bool, list[nn.Module]]]:
        """Blocks in a row that share a window, and whether it is the wide one."""
        for wide, run in groupby(zip(self.wide, self.blocks, strict=True), lambda pair: pair[0]):
            yield wide, [block for _, block in run]

    def forward(
        self,
        x: Tensor,
        groups: Tensor | None = None,
        num_groups: int | None = None,
        edit: Callable[[Tensor], Tensor] = unchanged,
    ) -> Tensor:
        x = edit(self.downsample(x)) if self.merge else x  # the first map is edited before positions are added
        for wide, blocks in self._runs():
            arrangement = self._arrange(wide, groups, num_groups, x)
            tokens = arrangement.sort(x)
            for block in blocks:
                tokens = self.run(block, tokens, arrangement)
            x = arrangement.restore(tokens, self.grid)
        return x

    def forward_kept(self, x: Tensor, kept: Tensor, cells: tuple[int, int]) -> Tensor:
        """Maps of single cells to the next ones, [B * n, r, r, C], which see each other where they share a window.

        Args:
            kept: [n], which of the cells Gh, Gw they are.
        """
        x = self.downsample(x)
        tokens = x.unflatten(0, (-1, len(kept))).flatten(1, 3)
        for wide, blocks in self._runs():
            arrangement = of_kept(kept, cells, self.grid, self._window(wide), self._position_index(wide), x.dtype)
            for block in blocks:
                tokens = self.run(block, tokens, arrangement)
        return tokens.reshape(x.shape)

    def _arrange(self, wide: bool, groups: Tensor | None, num_groups: int | None, x: Tensor) -> Arrangement:
        window, index = self._window(wide), self._position_index(wide)
        is_global = self.grid == (window, window)
        if is_global and groups is not None and groups.dim() == 2 and num_groups is not None:
            return by_group(groups, num_groups, self.grid, index)
        windows = by_window(self.grid, window, index)
        if groups is None:
            return windows
        attention = self.blocks[self.wide.index(wide)].attn
        assert isinstance(attention, WindowAttention)
        return separated(windows, groups, self.grid, x.dtype, by_members=attention.fuses_windows(_product_dtype(x)))


def _product_dtype(x: Tensor) -> torch.dtype:
    """Of what a linear layer makes of it."""
    device = x.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_autocast else x.dtype
