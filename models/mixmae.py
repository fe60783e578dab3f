"""MixMAE: an encoder of mixed images, a decoder of all of them, and the dual reconstruction loss (paper section 3.2).

Shapes are those of `models.mixing`; L = Gh*Gw cells, P = 32*32*3 values in a cell in the order row, column, channel.
"""

import torch
from torch import Tensor, nn

from models.decoder import Decoder
from models.encoder import Encoder
from models.mixing import check_num_images, mix_images


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
        self.norm_pix_loss = norm_pix_loss
        self.dual = dual
        self.separate_groups = separate_groups
        self.grid = encoder.grid
        self.cell = encoder.stride
        self.decoder = Decoder(
            encoder.num_features, encoder.grid, 3 * self.cell**2, decoder_dim, decoder_depth, decoder_num_heads
        )

    def forward(self, images: Tensor, groups: Tensor, partners: Tensor) -> Tensor:
        """The loss, an fp32 scalar, for normalised fp32 images [B, 3, H, W]."""
        visible = self._visible(groups)
        predictions = self._predict(images, groups, partners, visible)
        targets = cells(images, self.cell)
        if self.norm_pix_loss:
            targets = normalise_cells(targets)
        targets = targets[partners[: len(visible)]]
        # One mean over all guessed cells of all sequences, whose numbers differ by one where K does not divide L.
        guessed = (~visible).to(targets.dtype)[..., None]
        error = ((predictions.float() - targets) * guessed).square().sum()
        return error / (guessed.expand(*targets.shape[:3], 1).sum() * targets.shape[-1])

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


def cells(images: Tensor, side: int) -> Tensor:
    """[B, C, H, W] -> [B, L, side*side*C], pixels in the order row, column, channel."""
    batch, channels, height, width = images.shape
    x = images.view(batch, channels, height // side, side, width // side, side)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)


def uncells(x: Tensor, grid: tuple[int, int], channels: int = 3) -> Tensor:
    """The inverse of `cells`: [B, L, P] -> [B, C, H, W]."""
    side = int((x.shape[-1] // channels) ** 0.5)
    x = x.view(-1, *grid, side, side, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, channels, grid[0] * side, grid[1] * side)


def normalise_cells(x: Tensor) -> Tensor:
    """Zero mean and unit unbiased variance (+ 1e-6) of each cell, as the released implementation."""
    return (x - x.mean(-1, keepdim=True)) / cell_deviation(x)


def cell_deviation(x: Tensor) -> Tensor:
    return (x.var(-1, keepdim=True) + 1e-6).sqrt()
