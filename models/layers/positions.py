"""Learned positions of a token grid."""

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mixmae.models.layers.blocks import sincos_positions


class LearnedPositions(nn.Module):
    """Added to a map [B, H, W, C]; they begin as fixed sin-cos ones."""

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(sincos_positions(grid, dim).flatten(0, 1)[None])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.view(1, *self.grid, -1)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Another token grid, to which positions are resized (bicubic)."""
        if grid != self.grid:
            with torch.no_grad():
                weight = resize_positions(self.weight, self.grid, grid)
            self.weight = nn.Parameter(weight, self.weight.requires_grad)
            self.grid = grid

    def fit(self, weight: Tensor) -> Tensor:
        """The positions of another square grid resized to this one.

        Raises:
            ValueError: they are not of a square.
        """
        if weight.shape == self.weight.shape:
            return weight
        side = round(weight.shape[1] ** 0.5)
        if side**2 != weight.shape[1]:
            raise ValueError(f"positions of {weight.shape[1]} tokens are of no square: cannot resize them")
        return resize_positions(weight, (side, side), self.grid)


def resize_positions(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """[1, L, C] from one token grid to another (bicubic)."""
    resized: Tensor = resample_abs_pos_embed(weight, list(new), list(old), num_prefix_tokens=0)
    return resized
