"""MixMAE: an encoder of mixed images, a decoder of all of them, and the dual reconstruction loss (paper section 3.2).

Shapes are those of `mixmae.models.methods.mixing` and `mixmae.models.methods.reconstruction_loss`; L = Gh*Gw patches.
"""

from collections.abc import Collection
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models.encoders.contract import Encoder, MapEdit
from mixmae.models.methods.contract import Column
from mixmae.models.methods.decoded import DecodedMethod
from mixmae.models.methods.decoder import Decoder, decoder_sizes
from mixmae.models.methods.filling import draw_crops, draw_hidden, draw_shuffle, move_cells, num_hidden, zoom_in
from mixmae.models.methods.masking import blank, replace_tokens
from mixmae.models.methods.mixing import (
    check_num_images,
    draw_groups,
    draw_mix,
    group_sizes,
    mix_images,
    upsample_groups,
)
from mixmae.models.methods.reconstruction_loss import (
    ReconstructionLoss,
    denormalize_patches,
    patchify,
    patchify_valid,
    unpatchify,
)
from mixmae.models.methods.registry import register_method

Fill = Literal["mix", "zero", "learnable", "shuffle", "zoomin"]
_TOKENS = ("zero", "learnable")
"""Fills that stand behind the patch embedding."""


@register_method("mixmae")
class MixMAE(DecodedMethod):
    """`MixMAE(images, groups, partners) -> loss`; ablations draw more inputs than these.

    Args:
        num_images: K, images mixed into one input, 2 to 5 (paper Table 8: 4; the release ships 2).
        group_map: one map for a micro-batch, which makes attention by group possible, or one per sample.
        separate_groups: keep the groups apart in the encoder's attention (Table 10).
        mix_embedding: where groups are not kept apart, a learned vector for each group is added to its tokens at the
            beginning of each stage (Table 10).
        dual: reconstruct all K images of an input, or only the one of group 0 (the ablation "no dual").
        fill: what stands in the cells of group 1 (Table 9): another image (`mix`), zeros or a learned vector behind the
            patch embedding, the image's own cells in another order, or those of a crop of it, enlarged. All but `mix`
            are for one image, half of it masked, and are seen by its other half.
        extra_mask_ratio: share of each group's cells that a learned token replaces. With 2 images 0.5 makes a masking
            ratio of 0.75 (Table 9); the cells are drawn uniformly, since how is published nowhere.
        norm_pix_loss: targets are normalised per patch (zero mean, unit unbiased variance, channels together).

    Raises:
        ValueError: K is not in 2..5, the grid is too small for it, settings exclude each other, or the decoder's sizes
            do not fit each other.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_images: int = 4,
        group_map: Literal["micro_batch", "sample"] = "micro_batch",
        separate_groups: bool = True,
        mix_embedding: bool = False,
        dual: bool = True,
        fill: Fill = "mix",
        extra_mask_ratio: float = 0.0,
        norm_pix_loss: bool = True,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
    ) -> None:
        super().__init__(encoder)
        check_num_images(num_images, encoder.grid)
        self.num_images = num_images
        self.min_batch = num_images if fill == "mix" else 1
        self.group_map = group_map
        self.separate_groups = separate_groups
        self.dual = dual
        self.fill = fill
        self.extra_mask_ratio = extra_mask_ratio
        self.grid = encoder.grid
        self.patch_size = encoder.stride
        self.group_sizes = group_sizes(num_images, encoder.grid[0] * encoder.grid[1])
        self._check_fill()
        self._check_tokens(mix_embedding)
        self.mask_token: nn.Parameter | None = None
        if fill == "learnable" or extra_mask_ratio:
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, encoder.edit_dims[0]))
        self.mix_embedding = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn(num_images, dim)) for dim in (encoder.edit_dims if mix_embedding else ())
        )
        self.loss = ReconstructionLoss(self.patch_size, norm_pix_loss)
        sizes = decoder_sizes(encoder, decoder_dim, decoder_depth, decoder_num_heads)
        self.decoder = Decoder(encoder.num_features, encoder.grid, encoder.in_chans * self.patch_size**2, *sizes)

    def _check_fill(self) -> None:
        if self.fill == "mix":
            return
        if self.num_images != 2:
            raise ValueError(
                f"fill={self.fill} masks half of one image, and num_images is {self.num_images}; set num_images=2, or "
                "fill=mix"
            )
        if self.separate_groups:
            raise ValueError(f"fill={self.fill} would be seen by nothing; set separate_groups=false, or fill=mix")
        if self.dual:
            raise ValueError(f"fill={self.fill} leaves one image in an input; set dual=false, or fill=mix")

    def _check_tokens(self, mix_embedding: bool) -> None:
        if mix_embedding and (self.separate_groups or self.fill != "mix"):
            raise ValueError(
                "mix_embedding tells images apart that are mixed and not kept apart; set separate_groups=false and "
                "fill=mix, or mix_embedding=false"
            )
        if self.extra_mask_ratio:
            hidden = [num_hidden(size, self.extra_mask_ratio) for size in self.group_sizes]
            if self.fill != "mix" or any(not 0 < n < size for n, size in zip(hidden, self.group_sizes, strict=True)):
                raise ValueError(
                    f"extra_mask_ratio is {self.extra_mask_ratio}, which hides {hidden} cells of groups of "
                    f"{self.group_sizes} with fill={self.fill}; expected a share that hides some and leaves some, and "
                    "fill=mix"
                )
        if (mix_embedding or self.extra_mask_ratio or self.fill in _TOKENS) and not self.encoder.edit_dims:
            raise ValueError(f"{type(self.encoder).__name__} takes no tokens of a method; set fill=mix and no ratio")

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Groups, partners, and what an ablation needs: hidden cells, the order of shuffled ones, or crops."""
        per_sample = self.group_map == "sample"
        if self.fill == "mix":
            mix = draw_mix(batch, self.num_images, self.grid, generator, per_sample)
            if not self.extra_mask_ratio:
                return mix
            return (*mix, draw_hidden(mix.groups, self.group_sizes, self.extra_mask_ratio, generator))
        groups = draw_groups(batch if per_sample else None, self.num_images, self.grid, generator)
        own = torch.arange(batch)[None]
        if self.fill == "shuffle":
            return groups, own, draw_shuffle(groups, generator)
        if self.fill == "zoomin":
            return groups, own, draw_crops(batch, generator)
        return groups, own

    def forward(  # type: ignore[override]
        self, images: Tensor, groups: Tensor, partners: Tensor, *drawn: Tensor
    ) -> Tensor:
        """The loss, an fp32 scalar, for normalised fp32 images [B, 3, H, W]."""
        drawn, valid = self._split(drawn)
        predictions, visible = self._predict(images, groups, partners, *drawn)
        loss: Tensor = self.loss(predictions, images, partners, visible, valid)
        return loss

    def predict(self, images: Tensor, groups: Tensor, partners: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions fp32 [K, B, L, P] of images[partners], and which patches are visible, bool [K, B or 1, L]."""
        predictions, visible = self._predict(images, groups, partners, *drawn)
        return predictions.float(), visible

    def reconstruct(  # type: ignore[override]
        self, images: Tensor, groups: Tensor, partners: Tensor, *drawn: Tensor, rows: int = 4
    ) -> list[Column]:
        """The mixed input, then each source image and its reconstruction; visible patches are the image's own."""
        drawn, valid = self._split(drawn)
        predictions, visible = self.predict(images, groups, partners, *drawn)
        predictions, visible = predictions[:, :rows], visible[:, :rows]
        shown = partners[: len(predictions), :rows]
        sources, targets = images[shown], patchify(images, self.patch_size)[shown]
        if self.loss.norm_pix_loss:
            counted = patchify_valid(valid, images, self.patch_size)
            predictions = denormalize_patches(predictions, targets, None if counted is None else counted[shown])
        painted = torch.where(visible[..., None], targets, predictions)
        columns = [Column("mixed input", self._input(images, groups, partners, *drawn)[:rows])]
        for number, (source, patches) in enumerate(zip(sources, painted, strict=True), start=1):
            columns.append(Column(f"image {number}", source))
            columns.append(Column(f"reconstructed {number}", unpatchify(patches, self.grid, images.shape[1])))
        return columns

    def no_weight_decay(self) -> Collection[str]:
        own = {name for name, _ in self.named_parameters() if name.startswith(("mask_token", "mix_embedding."))}
        return {*super().no_weight_decay(), *own}

    def as_counted(self) -> Self:
        """All tokens of a window see each other: keeping groups apart by computing less makes no model smaller."""
        self.separate_groups = False
        return self

    def _split(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What was drawn beside groups and partners, and which pixels count."""
        return (inputs[:-1], inputs[-1]) if self.masks_invalid else (inputs, None)

    def _predict(self, images: Tensor, groups: Tensor, partners: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        visible = self._visible(groups, *drawn)
        return self.decoder(self._encode(images, groups, partners, *drawn).flatten(1, 2), visible), visible

    def _encode(self, images: Tensor, groups: Tensor, partners: Tensor, *drawn: Tensor) -> Tensor:
        """Features of the mixed inputs, [B, Gh, Gw, C]."""
        inputs = self._input(images, groups, partners, *drawn).to(self.decoder.mask_token.dtype)
        given = (groups, self.num_images) if self.separate_groups else ()
        edited = {"edit": self._edit(groups, *drawn)} if self._edits else {}
        features: Tensor = self.encoder(inputs, *given, **edited)
        return features

    def _input(self, images: Tensor, groups: Tensor, partners: Tensor, *drawn: Tensor) -> Tensor:
        """What the encoder sees, in pixels; blank where tokens are replaced behind the patch embedding."""
        if self.fill == "shuffle":
            return move_cells(images, drawn[0], self.grid)
        if self.fill == "zoomin":
            masked = upsample_groups(groups == 1, (images.shape[2], images.shape[3]))
            return torch.where(masked.unsqueeze(-3), zoom_in(images, drawn[0]), images)
        if self.fill in _TOKENS:
            return blank(images, self._replaced(groups))
        mixed = mix_images(images, groups, partners)
        return blank(mixed, self._replaced(groups, *drawn)) if self.extra_mask_ratio else mixed

    @property
    def _edits(self) -> bool:
        return self.fill in _TOKENS or bool(self.extra_mask_ratio) or len(self.mix_embedding) > 0

    def _edit(self, groups: Tensor, *drawn: Tensor) -> MapEdit:
        def edit(stage: int, x: Tensor) -> Tensor:
            if stage == 1 and (self.fill in _TOKENS or self.extra_mask_ratio):
                x = replace_tokens(x, self._replaced(groups, *drawn), self.mask_token)
            if len(self.mix_embedding):
                # A product, since the gradient of indexing adds row by row.
                members = F.one_hot(upsample_groups(groups, (x.shape[1], x.shape[2])), self.num_images)
                x = x + members.to(x.dtype) @ self.mix_embedding[stage - 1]
            return x

        return edit

    def _replaced(self, groups: Tensor, *drawn: Tensor) -> Tensor:
        """Cells with a token in place of pixels, bool [B or 1, Gh, Gw]."""
        return (groups == 1 if self.fill in _TOKENS else drawn[0]).view(-1, *self.grid)

    def _visible(self, groups: Tensor, *drawn: Tensor) -> Tensor:
        sequences = torch.arange(self.num_images if self.dual else 1, device=groups.device)
        flat = groups.flatten(-2).view(1, -1, groups.shape[-1] * groups.shape[-2])
        visible = flat == sequences[:, None, None]
        return visible & ~self._replaced(groups, *drawn).flatten(1) if self.extra_mask_ratio else visible
