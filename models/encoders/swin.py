"""Swin encoders of MixMAE: unshifted, large windows, global attention in the late stages (paper section 3.2).

Tokens are [B, H, W, C]. The output stride is 32: one position of the last stage is one cell of the mixing grid.
"""

from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from timm.layers import PatchEmbed, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from mixmae.models.encoders import contract, conversion
from mixmae.models.encoders.contract import MapEdit, edit_of
from mixmae.models.encoders.conversion import Converted
from mixmae.models.encoders.registry import register_encoder
from mixmae.models.encoders.staged import NUM_STAGES, StagedEncoder
from mixmae.models.encoders.swin_grids import (
    fitting_windows,
    require_wide_window,
    stage_grids,
    token_grids,
    windows_divide,
)
from mixmae.models.encoders.swin_stage import SwinStage
from mixmae.models.layers.blocks import init_weights, resized_positions, sincos_positions
from mixmae.models.layers.token_order import nearest_window
from mixmae.models.layers.window_attention import WindowAttention, resize_table

_WIDE_STAGE = 2
"""Stage 3, counted from 0: the one of many blocks."""


class Swin(StagedEncoder):
    """`encoder(images, groups=None) -> features`: pretraining, features and classification with one object.

    Args:
        img_size: pixels, one side or (height, width).
        window_size: window side of each stage; each stage's token grid must divide by it.
        pretrain_img_size: as img_size: the fixed sin-cos positions are those of images of this size, resized
            (bicubic) to the token grid, since others lie outside of what the weights have seen; None for `img_size`.
        wide_window: window side of some blocks of stage 3, `wide_blocks`, counted from 1: where a detector's or
            segmenter's maps are too large for global attention (paper section 4.3); None for that of the stage.
        num_classes: 0 leaves the head out; with `global_pool=""` the features stay a map [B, H/32, W/32, C].

    Raises:
        ValueError: the image does not divide into 32 px cells, or a stage's grid not into windows.
    """

    positions: Tensor
    position_size: tuple[int, int]
    keep_map = "micro_batch"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: Sequence[int] = (14, 14, 14, 7),
        wide_window: int | None = None,
        wide_blocks: Sequence[int] = (6, 12, 18),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pretrain_img_size: int | tuple[int, int] | None = None,
    ) -> None:
        if embed_dim % 4:
            raise ValueError(f"embed_dim {embed_dim} does not divide by 4, as sin-cos positions need")
        grids = token_grids(to_2tuple(img_size), patch_size, window_size)
        dims = [embed_dim * 2**i for i in range(NUM_STAGES)]
        reductions = [patch_size * 2**i for i in range(NUM_STAGES)]
        super().__init__(img_size, reductions[-1], dims, reductions)
        require_wide_window(wide_window, wide_blocks, grids[_WIDE_STAGE], depths[_WIDE_STAGE])
        self.window_size, self.wide_window = tuple(window_size), wide_window
        self.patch_embed = PatchEmbed(
            self.img_size, patch_size, in_chans, embed_dim, norm_layer=nn.LayerNorm, output_fmt="NHWC"
        )
        self.position_size = to_2tuple(img_size if pretrain_img_size is None else pretrain_img_size)
        if any(side < patch_size for side in self.position_size):
            raise ValueError(f"pretrain_img_size {pretrain_img_size}: expected {patch_size} px, one patch, or more")
        # A buffer in fp32 that DeepSpeed leaves alone; added in the dtype of the tokens.
        self.register_buffer("positions", self._positions(grids[0]), persistent=False)
        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.ModuleList(
            SwinStage(
                dims[i],
                depths[i],
                num_heads[i],
                window_size[i],
                grids[i],
                mlp_ratio,
                drop_path[i],
                merge=i > 0,
                wide_window=wide_window if i == _WIDE_STAGE else None,
                wide_blocks=wide_blocks,
            )
            for i in range(NUM_STAGES)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.add_head(num_classes, global_pool, drop_rate)
        self.apply(init_weights)

    @classmethod
    def fit_sizes(cls, sizes: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Windows that are not given fit the image: those of the name where they divide its grids."""
        merged = {**sizes, **given}
        if "window_size" not in given and "img_size" in given:
            side = merged["img_size"]
            defaults = {name: parameter.default for name, parameter in signature(cls).parameters.items()}
            windows, patch_size = ({**defaults, **merged}[name] for name in ("window_size", "patch_size"))
            grids = stage_grids(to_2tuple(side), patch_size)
            if all(0 not in grid for grid in grids) and not windows_divide(windows, grids):
                merged["window_size"] = fitting_windows(grids, windows)
        return merged

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        rows, cols = (side // self.patch_embed.patch_size[0] for side in self.position_size)
        return resized_positions(sincos_positions((rows, cols), self.feature_info[0]["num_chs"]), grid)

    def forward_kept(self, images: Tensor, kept: Tensor, class_token: Tensor | None = None) -> Tensor:
        """[B, n, C] of cells kept [1, n]: cut out of the images, and alone in every stage."""
        assert class_token is None, "windows have no place for a class token"
        kept = kept[0]
        (rows, cols), side = self.grid, self.stride
        cells = images.view(len(images), -1, rows, side, cols, side).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        pixels = cells.index_select(1, kept).flatten(0, 1)
        x = self.patch_embed.norm(self.patch_embed.proj(pixels).permute(0, 2, 3, 1))
        positions = self.positions.unflatten(1, (cols, -1)).unflatten(0, (rows, -1)).transpose(1, 2).flatten(0, 1)
        x = (x.unflatten(0, (-1, len(kept))) + positions.index_select(0, kept).to(x.dtype)).flatten(0, 1)
        for stage in self.stages:
            assert isinstance(stage, SwinStage)
            x = stage.forward_kept(x, kept, self.grid)
        return self.norm(x.unflatten(0, (-1, len(kept))).flatten(1, 3))

    def _embed(self, images: Tensor, groups: Tensor | None = None, edit: MapEdit | None = None) -> Tensor:
        x = edit_of(edit, 1)(self.patch_embed(contract.require_size(images, *self.img_size)))
        return x + self.positions.to(x.dtype)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, window_size: Sequence[int] | None = None
    ) -> None:
        """Another image size, with other windows where the present ones do not divide its grids."""
        height, width = to_2tuple(self.img_size if img_size is None else img_size)
        patch_size = self.patch_embed.patch_size[0]
        windows = fitting_windows(stage_grids((height, width), patch_size), self.window_size)
        grids = token_grids((height, width), patch_size, windows if window_size is None else window_size)
        self.window_size = tuple(windows if window_size is None else window_size)
        self._set_size((height, width))
        self.patch_embed.set_input_size((height, width))
        self.positions = self._positions(grids[0]).to(self.positions.device)
        if self.wide_window is not None:
            self.wide_window = nearest_window(grids[_WIDE_STAGE], self.wide_window)
        for stage, grid, window in zip(self.stages, grids, self.window_size, strict=False):  # stages may be pruned
            assert isinstance(stage, SwinStage)
            stage.set_grid(grid, window, None if stage.wide_window is None else self.wide_window)

    def convert(self, state: dict[str, Tensor]) -> Converted:
        """Blocks are not shifted here, and fixed positions are added: what shifted ones without positions have learned
        is a start, and not the same function."""
        return conversion.swin(state)

    def fit_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Relative-position tables are resized (bicubic) to the model's windows."""
        own, fitted = self.state_dict(), super().fit_state_dict(state)
        for key, table in fitted.items():
            if key.endswith("relative_position_bias_table") and key in own and table.shape != own[key].shape:
                fitted[key] = resize_table(table, (int(own[key].shape[0] ** 0.5) + 1) // 2)
        return fitted

    def no_weight_decay(self) -> Collection[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def set_fused_attention(self, dtype: torch.dtype = torch.bfloat16, windows: bool = True) -> list[str]:
        from mixmae.models.ops.grouped_attention import grouped_attention  # Triton comes with torch for GPUs alone
        from mixmae.models.ops.window_attention import window_attention

        reasons = []
        for number, stage in enumerate(self.stages, start=1):
            for module in stage.modules():
                if isinstance(module, WindowAttention):
                    reason = module.use_kernels(grouped_attention, window_attention if windows else None, dtype)
                    reasons += [f"stage {number}: {reason}"] if reason else []
        return list(dict.fromkeys(reasons))

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """timm's layer groups, from the image to the head, for layer-wise learning-rate decay."""
        block = (
            r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        )
        return {"stem": r"^patch_embed", "blocks": block}


# Sizes of the paper (section 3.2); windows for 224 px. `nano` is this project's own, for demonstrations and tests.
register_encoder(
    "mixmae_swin_nano",
    Swin,
    img_size=128,
    embed_dim=32,
    depths=(1, 1, 2, 1),
    num_heads=(1, 2, 4, 8),
    window_size=(8, 8, 8, 4),
)
register_encoder("mixmae_swin_tiny", Swin, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
register_encoder("mixmae_swin_small", Swin, embed_dim=96, num_heads=(3, 6, 12, 24))
register_encoder("mixmae_swin_base", Swin, embed_dim=128, num_heads=(4, 8, 16, 32), window_size=(7, 7, 14, 7))
register_encoder("mixmae_swin_base_w14", Swin, embed_dim=128, num_heads=(4, 8, 16, 32))
register_encoder("mixmae_swin_large", Swin, embed_dim=192, num_heads=(6, 12, 24, 48))
register_encoder("mixmae_swin_huge", Swin, embed_dim=352, num_heads=(11, 22, 44, 88))
