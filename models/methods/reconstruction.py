"""The reconstruction loss (paper section 3.2, and MAE's normalised targets).

Shapes: P = side*side*3 values of a cell in the order row, column, channel; L cells; K sequences for each mixed input.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ReconstructionLoss(nn.Module):
    """Mean squared error over all cells that were guessed, an fp32 scalar.

    Args:
        cell: pixels along a cell's side.
        norm_pix_loss: targets are normalised per cell (zero mean, unit unbiased variance, channels together).
    """

    def __init__(self, cell: int, norm_pix_loss: bool = True) -> None:
        super().__init__()
        self.cell = cell
        self.norm_pix_loss = norm_pix_loss

    def forward(self, predictions: Tensor, images: Tensor, partners: Tensor, visible: Tensor) -> Tensor:
        """Predictions [K, B, L, P] of images[partners]; visible, bool [K, B or 1, L], cells need no guess."""
        targets = cells(images, self.cell)
        if self.norm_pix_loss:
            targets = normalise_cells(targets)
        error = F.mse_loss(predictions.float(), targets[partners[: len(visible)]], reduction="none").mean(-1)
        # One mean over all guessed cells of all sequences, whose numbers differ by one where K does not divide L.
        guessed = (~visible).to(error.dtype).expand_as(error)
        return (error * guessed).sum() / guessed.sum()


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
