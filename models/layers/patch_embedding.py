"""Patch embedding by a convolution that does not overlap, so that patches of a cell see that cell alone."""

from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """[B, H, W, C] -> [B, H/patch, W/patch, dim].

    Args:
        norm: LayerNorm behind the convolution.
    """

    def __init__(self, in_dim: int, dim: int, patch: int, norm: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, patch, patch)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
