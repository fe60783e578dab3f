"""The reconstruction loss (paper section 3.2, and MAE's normalised targets).

Shapes: P = side*side*C values of a patch in the order row, column, channel; L patches; K sequences for each mixed
input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReconstructionLoss(nn.Module):
    """Mean squared error over all masked patches, an fp32 scalar; over those of their pixels that hold something.

    Args:
        patch_size: pixels along a patch's side.
        norm_pix_loss: targets are normalised per patch (zero mean, unit unbiased variance, channels together).
    """

    def __init__(self, patch_size: int, norm_pix_loss: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_pix_loss = norm_pix_loss

    def forward(
        self,
        predictions: Tensor,
        images: Tensor,
        partners: Tensor | None,
        visible: Tensor,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Predictions [K, B, L, P] of images[partners]; visible, bool [K, B or 1, L], patches do not count.

        Without partners K is 1, and images are predicted in their order.

        Args:
            valid: bool [B, H, W], pixels that count; None: all do, and where all are True the numbers are the same.
        """
        targets, counted = patchify(images, self.patch_size), patchify_valid(valid, images, self.patch_size)
        if self.norm_pix_loss:
            targets = normalize_patches(targets, counted)
        targets = _of_partners(targets, partners, len(visible))
        counted = None if counted is None else _of_partners(counted, partners, len(visible))
        error = F.mse_loss(predictions.float(), targets, reduction="none")
        if counted is None:
            error, share = error.mean(-1), None
        else:
            error, share = (error * counted).mean(-1), counted.to(error.dtype).mean(-1)
        # One mean over all masked patches of all sequences, whose numbers differ by one where K does not divide L.
        masked = (~visible).to(error.dtype).expand_as(error)
        if share is None:
            return (error * masked).sum() / masked.sum()
        # A patch counts by its share of pixels that count; none at all make a loss of 0.
        return (error * masked).sum() / (share * masked).sum().clamp(min=torch.finfo(error.dtype).tiny)


def _of_partners(patches: Tensor, partners: Tensor | None, count: int) -> Tensor:
    """[K, B, L, P] of `patchify`'s, for the first `count` of the partners."""
    return patches[None] if partners is None else patches[partners[:count]]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, L, patch_size^2 * C], pixels in the order row, column, channel."""
    batch, channels, height, width = images.shape
    x = images.view(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size * patch_size * channels)


def patchify_valid(valid: Tensor | None, images: Tensor, patch_size: int) -> Tensor | None:
    """bool [B, L, P]: which values of `patchify` count, of pixels [B, H, W] that do; None for None."""
    return None if valid is None else patchify(valid[:, None].expand_as(images), patch_size)


def unpatchify(x: Tensor, grid: tuple[int, int], channels: int = 3) -> Tensor:
    """The inverse of `patchify`: [B, L, P] -> [B, C, H, W]."""
    side = int((x.shape[-1] // channels) ** 0.5)
    x = x.view(-1, *grid, side, side, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, channels, grid[0] * side, grid[1] * side)


def normalize_patches(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """Zero mean and unit unbiased variance (+ 1e-6) of each patch, as the released implementation.

    Args:
        counted: values that mean and variance are of; None for all.
    """
    mean, std = patch_moments(x, counted)
    return (x - mean) / std


def denormalize_patches(x: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
    """Predictions of normalised patches with the mean and deviation of their targets."""
    mean, std = patch_moments(targets, counted)
    return x * std + mean


def patch_moments(x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of patches [..., P], of the values that count: [..., 1] each."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
    if counted is not None:
        number = counted.sum(-1, keepdim=True)
        whole = number == x.shape[-1]  # of which the numbers stay the same, bit for bit
        mean = torch.where(whole, mean, (x * counted).sum(-1, keepdim=True) / number.clamp(min=1))
        squares = ((x - mean) * counted).square().sum(-1, keepdim=True)
        var = torch.where(whole, var, squares / (number - 1).clamp(min=1))
    return mean, (var + 1e-6).sqrt()
