"""The reconstruction loss (paper section 3.2, and MAE's normalised targets).

Shapes: P = side*side*3 values of a patch in the order row, column, channel; L patches; K sequences for each mixed
input.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ReconstructionLoss(nn.Module):
    """Mean squared error over all masked patches, an fp32 scalar.

    Args:
        patch_size: pixels along a patch's side.
        norm_pix_loss: targets are normalised per patch (zero mean, unit unbiased variance, channels together).
    """

    def __init__(self, patch_size: int, norm_pix_loss: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_pix_loss = norm_pix_loss

    def forward(self, predictions: Tensor, images: Tensor, partners: Tensor | None, visible: Tensor) -> Tensor:
        """Predictions [K, B, L, P] of images[partners]; visible, bool [K, B or 1, L], patches do not count.

        Without partners K is 1, and images are predicted in their order.
        """
        targets = patchify(images, self.patch_size)
        if self.norm_pix_loss:
            targets = normalize_patches(targets)
        targets = targets[None] if partners is None else targets[partners[: len(visible)]]
        error = F.mse_loss(predictions.float(), targets, reduction="none").mean(-1)
        # One mean over all masked patches of all sequences, whose numbers differ by one where K does not divide L.
        masked = (~visible).to(error.dtype).expand_as(error)
        return (error * masked).sum() / masked.sum()


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, L, patch_size^2 * C], pixels in the order row, column, channel."""
    batch, channels, height, width = images.shape
    x = images.view(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size * patch_size * channels)


def unpatchify(x: Tensor, grid: tuple[int, int], channels: int = 3) -> Tensor:
    """The inverse of `patchify`: [B, L, P] -> [B, C, H, W]."""
    side = int((x.shape[-1] // channels) ** 0.5)
    x = x.view(-1, *grid, side, side, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, channels, grid[0] * side, grid[1] * side)


def normalize_patches(x: Tensor) -> Tensor:
    """Zero mean and unit unbiased variance (+ 1e-6) of each patch, as the released implementation."""
    return (x - x.mean(-1, keepdim=True)) / patch_std(x)


def denormalize_patches(x: Tensor, targets: Tensor) -> Tensor:
    """Predictions of normalised patches with the mean and deviation of their targets."""
    return x * patch_std(targets) + targets.mean(-1, keepdim=True)


def patch_std(x: Tensor) -> Tensor:
    return (x.var(-1, keepdim=True) + 1e-6).sqrt()
