"""MixMAE: an encoder of mixed images, a decoder of all of them, and the dual reconstruction loss (paper section 3.2).

Shapes are those of `mixmae.models.methods.mixing` and `mixmae.models.methods.reconstruction`; L = Gh*Gw cells.
"""

import torch
from torch import Tensor, nn

from mixmae.models.encoders.contract import Encoder
from mixmae.models.methods.decoder import Decoder
from mixmae.models.methods.mixing import check_num_images, mix_images
from mixmae.models.methods.reconstruction import ReconstructionLoss


class MixMAE(nn.Module):
    """`MixMAE(images, groups, partners) -> loss`.

    Args:
        norm_pix_loss: targets are normalised per cell (zero mean, unit unbiased variance, channels together).
        dual: reconstruct all K images of an input, or only the one of group 0 (the ablation "no dual").
        separate_groups: keep the groups apart in the encoder's attention (Table 10).
    """

    def __init__(
        self,
        encoder: Encoder,
        num_images: int = 4,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = True,
        dual: bool = True,
        separate_groups: bool = True,
    ) -> None:
        super().__init__()
        check_num_images(num_images, encoder.grid)
        self.encoder = encoder
        self.num_images = num_images
        self.dual = dual
        self.separate_groups = separate_groups
        self.grid = encoder.grid
        self.cell = encoder.stride
        self.loss = ReconstructionLoss(self.cell, norm_pix_loss)
        self.decoder = Decoder(
            encoder.num_features, encoder.grid, 3 * self.cell**2, decoder_dim, decoder_depth, decoder_num_heads
        )

    def forward(self, images: Tensor, groups: Tensor, partners: Tensor) -> Tensor:
        """The loss, an fp32 scalar, for normalised fp32 images [B, 3, H, W]."""
        visible = self._visible(groups)
        predictions = self._predict(images, groups, partners, visible)
        loss: Tensor = self.loss(predictions, images, partners, visible)
        return loss

    def reconstruct(self, images: Tensor, groups: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions fp32 [K, B, L, P] of images[partners], and which cells were visible, bool [K, B or 1, L]."""
        visible = self._visible(groups)
        return self._predict(images, groups, partners, visible).float(), visible

    def _predict(self, images: Tensor, groups: Tensor, partners: Tensor, visible: Tensor) -> Tensor:
        mixed = mix_images(images, groups, partners).to(self.decoder.mask_token.dtype)
        features = self.encoder(mixed, groups, self.num_images) if self.separate_groups else self.encoder(mixed)
        return self.decoder(features.flatten(1, 2), visible)

    def _visible(self, groups: Tensor) -> Tensor:
        sequences = torch.arange(self.num_images if self.dual else 1, device=groups.device)
        flat = groups.flatten(-2).view(1, -1, groups.shape[-1] * groups.shape[-2])
        return flat == sequences[:, None, None]
