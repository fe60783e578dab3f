"""Twins-SVT encoders (Chu et al. 2021) for MixMAE.

Blocks take turns: attention inside windows, which cross cells and so need a mask, and attention of all tokens to one
key and value of each 32 px cell, which is sorted by group. The position encoding, a depthwise convolution behind a
stage's first block, is a mixed one.
"""

from collections.abc import Callable, Collection, Sequence

from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from mixmae.models.encoders import conversion
from mixmae.models.encoders.contract import unchanged
from mixmae.models.encoders.conversion import Converted
from mixmae.models.encoders.registry import register_encoder
from mixmae.models.encoders.staged import NUM_STAGES, Stage, StagedEncoder
from mixmae.models.layers.blocks import Block, init_weights
from mixmae.models.layers.cell_order import SelfAttention, SubsampledAttention, by_cell, by_window
from mixmae.models.layers.mixed_cells import Mix
from mixmae.models.layers.mixed_conv import MixedConv2d
from mixmae.models.layers.patch_embedding import PatchEmbedding
from mixmae.models.layers.token_order import nearest_window

_EPS = 1e-6


class TwinsStage(Stage):
    """Patch embedding, then blocks: the first and every other local, the rest global."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        patch: int,
        num_heads: int,
        window: int,
        mlp_ratio: float,
        drop_path: Sequence[float],
        cells: tuple[int, int],
        reduction: int,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.window_size = window
        self.reduction = reduction
        self.set_cells(cells)
        self.patch_embed = PatchEmbedding(in_dim, dim, patch)
        self.pos_conv = MixedConv2d(dim, dim, 3, depthwise=True)
        for i, rate in enumerate(drop_path):
            attention = SubsampledAttention(dim, num_heads, reduction) if i % 2 else SelfAttention(dim, num_heads)
            self.blocks.append(Block(dim, attention, mlp_ratio, rate, _EPS))

    def set_cells(self, cells: tuple[int, int]) -> None:
        """Windows are the nearest that divide the grid of tokens."""
        self.cells = cells
        self.grid = (cells[0] * self.reduction, cells[1] * self.reduction)
        self.window = nearest_window(self.grid, self.window_size)

    def forward(
        self,
        x: Tensor,
        groups: Tensor | None = None,
        num_groups: int | None = None,
        edit: Callable[[Tensor], Tensor] = unchanged,
    ) -> Tensor:
        x = edit(self.patch_embed(x))
        layouts = (
            by_window(self.grid, self.window, groups, x.shape[0], x.dtype),
            by_cell(self.grid, self.cells, groups, num_groups, x.dtype),
        )
        for i, block in enumerate(self.blocks):
            layout = layouts[i % 2]
            tokens = self.run(block, layout.arrangement.sort(x), layout)
            x = layout.arrangement.restore(tokens, self.grid)
            if i == 0:
                x = x + self.pos_conv(x, None if groups is None else Mix.of(groups))
        return x


class Twins(StagedEncoder):
    """`encoder(images, groups=None) -> features`.

    Args:
        img_size: pixels, one side or (height, width).
        window_size: a local window's side. Attention has no position bias, so that windows may change with the image:
            where this does not divide a stage's token grid, the nearest side that does is taken (8, 8, 8, 6 at 384 px).
        num_classes: 0 leaves the head out; with `global_pool=""` the features stay a map [B, H/32, W/32, C].

    Raises:
        ValueError: the image does not divide into 32 px cells, or a width into its heads.
    """

    first_conv = "stages.0.patch_embed.proj"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (128, 256, 512, 1024),
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        strides = [patch_size * 2**i for i in range(NUM_STAGES)]
        super().__init__(img_size, strides[-1], embed_dims, strides)
        self.add_head(num_classes, global_pool, drop_rate)
        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.ModuleList(
            TwinsStage(
                embed_dims[i - 1] if i else in_chans,
                embed_dims[i],
                2 if i else patch_size,
                num_heads[i],
                window_size,
                mlp_ratio,
                drop_path[i],
                self.grid,
                self.stride // strides[i],
            )
            for i in range(NUM_STAGES)
        )
        self.norm = nn.LayerNorm(embed_dims[-1], _EPS)
        self.apply(init_weights)

    def no_weight_decay(self) -> Collection[str]:
        """Position encodings."""
        return {name for name, _ in self.named_parameters() if ".pos_conv." in name}

    def convert(self, state: dict[str, Tensor]) -> Converted:
        return conversion.twins(state)


register_encoder(
    "mixmae_twins_nano", Twins, img_size=128, embed_dims=(32, 64, 96, 128), depths=(2, 1, 2, 2), num_heads=(1, 2, 3, 4)
)
register_encoder(
    "mixmae_twins_small", Twins, embed_dims=(64, 128, 256, 512), depths=(2, 2, 10, 4), num_heads=(2, 4, 8, 16)
)
register_encoder("mixmae_twins_base", Twins, embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24))
register_encoder("mixmae_twins_large", Twins)
