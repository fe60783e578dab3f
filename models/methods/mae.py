"""MAE: an encoder sees kept patches alone, and a small decoder predicts the others (He et al. 2021).

On ViT as published: each sample keeps patches of its own, behind a class token. On Swin nobody has published how; this
is our reading: MixMAE's encoder on one group of cells, the same ones for a micro-batch, while all other tokens are left
out of every stage (`Swin.forward_kept`); there is no class token.

Shapes: L cells of the encoder's grid, of which n are kept; `order` int64 [B or 1, L] has the kept ones first.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from mixmae.models.encoders.contract import Encoder
from mixmae.models.methods.contract import Column
from mixmae.models.methods.decoded import DecodedMethod
from mixmae.models.methods.decoder import KeptDecoder, decoder_sizes
from mixmae.models.methods.masking import blank, check_ratio, draw_order, first_of
from mixmae.models.methods.reconstruction_loss import (
    ReconstructionLoss,
    denormalize_patches,
    patchify,
    patchify_valid,
    unpatchify,
)
from mixmae.models.methods.registry import register_method

_EPS = 1e-6
"""Of the decoder's LayerNorms, as MAE's."""


@register_method("mae")
class MAE(DecodedMethod):
    """`MAE(images, order) -> loss`.

    The class token is the method's: like the decoder it stays behind when the encoder is exported. ViT's positions
    begin as MAE's fixed ones, and are learned.

    Args:
        mask_ratio: share of dropped cells; kept ones are rounded down.
        norm_pix_loss: targets are normalised per patch (zero mean, unit unbiased variance, channels together).

    Raises:
        ValueError: an encoder that cannot leave tokens out, a ratio that drops no cell or all, or sizes of the decoder
            that do not fit each other.
    """

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
    ) -> None:
        super().__init__(encoder)
        if encoder.keep_map is None:
            raise ValueError(
                f"mae drops masked tokens, which {type(encoder).__name__} cannot leave out; take a ViT or a Swin "
                "encoder, or method.name=simmim or mixmae"
            )
        self.grid, self.patch_size = encoder.grid, encoder.stride
        self.num_cells = encoder.grid[0] * encoder.grid[1]
        self.num_kept = int(self.num_cells * (1 - mask_ratio))
        check_ratio(mask_ratio, self.num_cells - self.num_kept, self.num_cells)
        self.class_token: nn.Parameter | None = None
        if encoder.keep_map == "sample":
            self.class_token = nn.Parameter(torch.zeros(1, 1, encoder.num_features))
            nn.init.normal_(self.class_token, std=0.02)
        self.loss = ReconstructionLoss(self.patch_size, norm_pix_loss)
        values = encoder.in_chans * self.patch_size**2
        sizes = decoder_sizes(encoder, decoder_dim, decoder_depth, decoder_num_heads)
        self.decoder = KeptDecoder(encoder.num_features, encoder.grid, values, *sizes, norm_eps=_EPS)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor]:
        return (draw_order(batch if self.encoder.keep_map == "sample" else 1, self.num_cells, generator),)

    def forward(  # type: ignore[override]
        self, images: Tensor, order: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """The loss, an fp32 scalar, for normalised fp32 images [B, 3, H, W]."""
        loss: Tensor = self.loss(self._predict(images, order)[None], images, None, self._kept(order)[None], valid)
        return loss

    def predict(self, images: Tensor, order: Tensor) -> Tensor:
        """Predicted patches, fp32 [B, L, P]."""
        return self._predict(images, order).float()

    def reconstruct(  # type: ignore[override]
        self, images: Tensor, order: Tensor, valid: Tensor | None = None, rows: int = 4
    ) -> list[Column]:
        """The kept patches, the image, and the image with dropped patches as predicted."""
        images, order = images[:rows], order[:rows]
        kept, targets = self._kept(order), patchify(images, self.patch_size)
        predictions = self.predict(images, order)
        if self.loss.norm_pix_loss:
            counted = patchify_valid(None if valid is None else valid[:rows], images, self.patch_size)
            predictions = denormalize_patches(predictions, targets, counted)
        painted = unpatchify(torch.where(kept[..., None], targets, predictions), self.grid, images.shape[1])
        dropped = ~kept.unflatten(1, self.grid)
        return [Column("kept", blank(images, dropped)), Column("image", images), Column("reconstructed", painted)]

    def no_weight_decay(self) -> Collection[str]:
        return {*super().no_weight_decay(), *(() if self.class_token is None else ("class_token",))}

    def _predict(self, images: Tensor, order: Tensor) -> Tensor:
        images = images.to(self.decoder.mask_token.dtype)
        kept = order[:, : self.num_kept]
        if self.class_token is None:
            return self.decoder(self.encoder.forward_kept(images, kept), order)
        return self.decoder(self.encoder.forward_kept(images, kept, self.class_token), order, num_prefix=1)

    def _kept(self, order: Tensor) -> Tensor:
        """bool [B or 1, L]."""
        return first_of(order, self.num_kept)
