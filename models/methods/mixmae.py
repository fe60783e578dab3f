"""MixMAE: an encoder of mixed images, a decoder of all of them, and the dual reconstruction loss (paper section 3.2).

Shapes are those of `mixmae.models.methods.mixing` and `mixmae.models.methods.reconstruction_loss`; L = Gh*Gw patches.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from mixmae.models.encoders.contract import Encoder
from mixmae.models.methods.contract import Column, Method
from mixmae.models.methods.decoder import Decoder
from mixmae.models.methods.mixing import Mix, check_num_images, draw_mix, mix_images
from mixmae.models.methods.reconstruction_loss import ReconstructionLoss, denormalize_patches, patchify, unpatchify
from mixmae.models.methods.registry import register_method


@register_method("mixmae")
class MixMAE(Method):
    """`MixMAE(images, groups, partners) -> loss`.

    Args:
        num_images: K, images mixed into one input, 2 to 5 (paper Table 8: 4; the release ships 2).
        group_map: one map for a micro-batch, which makes attention by group possible, or one per sample.
        separate_groups: keep the groups apart in the encoder's attention (Table 10).
        dual: reconstruct all K images of an input, or only the one of group 0 (the ablation "no dual").
        norm_pix_loss: targets are normalised per patch (zero mean, unit unbiased variance, channels together).

    Raises:
        ValueError: K is not in 2..5, the grid is too small for it, or the decoder's sizes do not fit each other.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_images: int = 4,
        group_map: Literal["micro_batch", "sample"] = "micro_batch",
        separate_groups: bool = True,
        dual: bool = True,
        norm_pix_loss: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ) -> None:
        super().__init__(encoder)
        check_num_images(num_images, encoder.grid)
        self.num_images = self.min_batch = num_images
        self.group_map = group_map
        self.dual = dual
        self.separate_groups = separate_groups
        self.grid = encoder.grid
        self.patch_size = encoder.stride
        self.loss = ReconstructionLoss(self.patch_size, norm_pix_loss)
        self.decoder = Decoder(
            encoder.num_features, encoder.grid, 3 * self.patch_size**2, decoder_dim, decoder_depth, decoder_num_heads
        )

    def draw(self, batch: int, generator: torch.Generator) -> Mix:
        return draw_mix(batch, self.num_images, self.grid, generator, per_sample=self.group_map == "sample")

    def forward(self, images: Tensor, groups: Tensor, partners: Tensor) -> Tensor:  # type: ignore[override]
        """The loss, an fp32 scalar, for normalised fp32 images [B, 3, H, W]."""
        predictions, visible = self._predict(images, groups, partners)
        loss: Tensor = self.loss(predictions, images, partners, visible)
        return loss

    def predict(self, images: Tensor, groups: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions fp32 [K, B, L, P] of images[partners], and which patches are visible, bool [K, B or 1, L]."""
        predictions, visible = self._predict(images, groups, partners)
        return predictions.float(), visible

    def reconstruct(  # type: ignore[override]
        self, images: Tensor, groups: Tensor, partners: Tensor, rows: int = 4
    ) -> list[Column]:
        """The mixed input, then each source image and its reconstruction; visible patches are the image's own."""
        predictions, visible = self.predict(images, groups, partners)
        predictions, visible = predictions[:, :rows], visible[:, :rows]
        sources = images[partners[: len(predictions), :rows]]
        targets = torch.stack([patchify(source, self.patch_size) for source in sources])
        if self.loss.norm_pix_loss:
            predictions = denormalize_patches(predictions, targets)
        painted = torch.where(visible[..., None], targets, predictions)
        columns = [Column("mixed input", mix_images(images, groups, partners)[:rows])]
        for number, (source, patches) in enumerate(zip(sources, painted, strict=True), start=1):
            columns.append(Column(f"image {number}", source))
            columns.append(Column(f"reconstructed {number}", unpatchify(patches, self.grid)))
        return columns

    def block_groups(self) -> Mapping[str, Sequence[nn.Module]]:
        return {**super().block_groups(), "decoder": list(self.decoder.blocks)}

    def compiled_parts(self) -> Sequence[nn.Module]:
        return [self.loss]

    def set_grad_checkpointing(self, groups: Collection[str]) -> None:
        super().set_grad_checkpointing(groups)
        self.decoder.set_grad_checkpointing("decoder" in groups)

    def no_weight_decay(self) -> Collection[str]:
        return {*super().no_weight_decay(), "decoder.mask_token"}

    def as_counted(self) -> Self:
        """All tokens of a window see each other: keeping groups apart by computing less makes no model smaller."""
        self.separate_groups = False
        return self

    def _predict(self, images: Tensor, groups: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
        visible = self._visible(groups)
        mixed = mix_images(images, groups, partners).to(self.decoder.mask_token.dtype)
        features = self.encoder(mixed, groups, self.num_images) if self.separate_groups else self.encoder(mixed)
        return self.decoder(features.flatten(1, 2), visible), visible

    def _visible(self, groups: Tensor) -> Tensor:
        sequences = torch.arange(self.num_images if self.dual else 1, device=groups.device)
        flat = groups.flatten(-2).view(1, -1, groups.shape[-1] * groups.shape[-2])
        return flat == sequences[:, None, None]
