"""ViT encoders (Dosovitskiy et al. 2021) for MixMAE: a cell is one patch of 16 px (supplement, Table 7).

There is no class token, which would see all groups; features are pooled by their mean. The blocks stand in four stages
of one quarter of the depth each, all at stride 16, so that stages can be named here as in every encoder.
"""

from collections.abc import Callable

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from mixmae.models.encoders import conversion
from mixmae.models.encoders.contract import MapEdit, edit_of, unchanged
from mixmae.models.encoders.conversion import Converted
from mixmae.models.encoders.registry import register_encoder
from mixmae.models.encoders.staged import NUM_STAGES, Stage, StagedEncoder
from mixmae.models.layers.blocks import Block, init_weights
from mixmae.models.layers.cell_order import SelfAttention, by_cell, dense
from mixmae.models.layers.patch_embedding import PatchEmbedding
from mixmae.models.layers.positions import LearnedPositions

_EPS = 1e-6


class ViTStage(Stage):
    """A quarter of the blocks; attention is global."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: list[float],
        grid: tuple[int, int],
        is_first: bool,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.is_first = is_first
        self.blocks = nn.ModuleList(
            Block(dim, SelfAttention(dim, num_heads), mlp_ratio, rate, _EPS) for rate in drop_path
        )

    def set_cells(self, cells: tuple[int, int]) -> None:
        self.grid = cells

    def forward(
        self,
        x: Tensor,
        groups: Tensor | None = None,
        num_groups: int | None = None,
        edit: Callable[[Tensor], Tensor] = unchanged,
    ) -> Tensor:
        x = x if self.is_first else edit(x)  # the first map is edited before positions are added
        layout = by_cell(self.grid, self.grid, groups, num_groups, x.dtype)
        tokens = layout.arrangement.sort(x)
        for block in self.blocks:
            tokens = self.run(block, tokens, layout)
        return layout.arrangement.restore(tokens, self.grid)


class ViT(StagedEncoder):
    """`encoder(images, groups=None) -> features`.

    Positions are learned, and begin as MAE's fixed sin-cos ones.

    Args:
        img_size: pixels, one side or (height, width).
        depth: blocks, a multiple of four.
        num_classes: 0 leaves the head out; with `global_pool=""` the features stay a map [B, H/16, W/16, C].

    Raises:
        ValueError: the image does not divide into patches, or the depth into four stages.
    """

    stride = 16
    keep_map = "sample"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if depth % NUM_STAGES or embed_dim % 4:
            raise ValueError(f"depth {depth} and embed_dim {embed_dim}: expected multiples of {NUM_STAGES} and 4")
        dims, reductions = [embed_dim] * NUM_STAGES, [patch_size] * NUM_STAGES
        super().__init__(img_size, patch_size, dims, reductions)
        self.add_head(num_classes, global_pool, drop_rate)
        self.patch_embed = PatchEmbedding(in_chans, embed_dim, patch_size, norm=False)
        self.pos_embed = LearnedPositions(self.grid, embed_dim)
        rates = calculate_drop_path_rates(drop_path_rate, [depth // NUM_STAGES] * NUM_STAGES, stagewise=True)
        self.stages = nn.ModuleList(
            ViTStage(embed_dim, num_heads, mlp_ratio, rate, self.grid, is_first=i == 0) for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(embed_dim, _EPS)
        self.apply(init_weights)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        super().set_input_size(img_size)
        self.pos_embed.set_grid(self.grid)

    def _embed(self, images: Tensor, groups: Tensor | None = None, edit: MapEdit | None = None) -> Tensor:
        return self.pos_embed(edit_of(edit, 1)(self.patch_embed(super()._embed(images))))

    def forward_kept(self, images: Tensor, kept: Tensor, class_token: Tensor | None = None) -> Tensor:
        """[B, n, C], with a class token [B, 1 + n, C], of patches kept [B or 1, n]."""
        x = self._embed(images).flatten(1, 2)
        x = x.gather(1, kept[..., None].expand(len(x), -1, x.shape[-1]))
        if class_token is not None:
            x = torch.cat([class_token.expand(len(x), -1, -1), x], dim=1)
        layout = dense(x.shape[1])
        for stage in self.stages:
            assert isinstance(stage, ViTStage)
            for block in stage.blocks:
                x = stage.run(block, x, layout)
        return self.norm(x)

    def convert(self, state: dict[str, Tensor]) -> Converted:
        return conversion.vit(state, len(self.stage_blocks(1)))


register_encoder("mixmae_vit_nano", ViT, img_size=128, embed_dim=64, depth=4, num_heads=2)
register_encoder("mixmae_vit_small", ViT, embed_dim=384, num_heads=6)
register_encoder("mixmae_vit_base", ViT)
register_encoder("mixmae_vit_large", ViT, embed_dim=1024, depth=24, num_heads=16)
