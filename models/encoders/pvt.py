"""PVT encoders, version 1 (Wang et al. 2021) for MixMAE.

In every stage the spatial reduction makes one key and value of a cell of 32 px, so that groups separate as cells. There
is no class token, which in stage 4 would see all groups; features are pooled by their mean.
"""

from collections.abc import Callable, Sequence

from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from mixmae.models.encoders import conversion
from mixmae.models.encoders.contract import unchanged
from mixmae.models.encoders.conversion import Converted
from mixmae.models.encoders.registry import register_encoder
from mixmae.models.encoders.staged import NUM_STAGES, Stage, StagedEncoder
from mixmae.models.layers.blocks import Block, init_weights
from mixmae.models.layers.cell_order import SubsampledAttention, by_cell
from mixmae.models.layers.patch_embedding import PatchEmbedding
from mixmae.models.layers.positions import LearnedPositions

_EPS = 1e-6


class PVTStage(Stage):
    """Patch embedding and positions, then blocks that keep their tokens cell by cell."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        patch: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: Sequence[float],
        cells: tuple[int, int],
        reduction: int,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.cells = cells
        self.reduction = reduction
        self.patch_embed = PatchEmbedding(in_dim, dim, patch)
        self.pos_embed = LearnedPositions(self._grid(), dim)
        self.blocks.extend(
            Block(dim, SubsampledAttention(dim, num_heads, reduction), mlp_ratio, rate, _EPS) for rate in drop_path
        )

    def _grid(self) -> tuple[int, int]:
        return (self.cells[0] * self.reduction, self.cells[1] * self.reduction)

    def set_cells(self, cells: tuple[int, int]) -> None:
        """Positions are resized."""
        self.cells = cells
        self.pos_embed.set_grid(self._grid())

    def forward(
        self,
        x: Tensor,
        groups: Tensor | None = None,
        num_groups: int | None = None,
        edit: Callable[[Tensor], Tensor] = unchanged,
    ) -> Tensor:
        x = self.pos_embed(edit(self.patch_embed(x)))
        layout = by_cell(self._grid(), self.cells, groups, num_groups, x.dtype)
        tokens = layout.arrangement.sort(x)
        for block in self.blocks:
            tokens = self.run(block, tokens, layout)
        return layout.arrangement.restore(tokens, self._grid())


class PVT(StagedEncoder):
    """`encoder(images, groups=None) -> features`.

    Args:
        img_size: pixels, one side or (height, width).
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
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 8, 27, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        strides = [patch_size * 2**i for i in range(NUM_STAGES)]
        super().__init__(img_size, strides[-1], embed_dims, strides)
        self.add_head(num_classes, global_pool, drop_rate)
        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.ModuleList(
            PVTStage(
                embed_dims[i - 1] if i else in_chans,
                embed_dims[i],
                2 if i else patch_size,
                num_heads[i],
                mlp_ratios[i],
                drop_path[i],
                self.grid,
                self.stride // strides[i],
            )
            for i in range(NUM_STAGES)
        )
        self.norm = nn.LayerNorm(embed_dims[-1], _EPS)
        self.apply(init_weights)

    def convert(self, state: dict[str, Tensor]) -> Converted:
        return conversion.pvt(state)


register_encoder(
    "mixmae_pvt_nano",
    PVT,
    img_size=128,
    embed_dims=(16, 32, 40, 64),
    depths=(1, 1, 2, 1),
)
register_encoder("mixmae_pvt_tiny", PVT, depths=(2, 2, 2, 2))
register_encoder("mixmae_pvt_small", PVT, depths=(3, 4, 6, 3))
register_encoder("mixmae_pvt_medium", PVT, depths=(3, 4, 18, 3))
register_encoder("mixmae_pvt_large", PVT)
