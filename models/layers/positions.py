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
        """The positions of another grid resized to this one: of a square, or else of one of this one's proportions.

        Raises:
            ValueError: they are of neither.
        """
        if weight.shape == self.weight.shape:
            return weight
        count = weight.shape[1]
        side = round(count**0.5)
        rows = side if side**2 == count else round((count * self.grid[0] / self.grid[1]) ** 0.5)
        cols = count // max(rows, 1)
        if rows * cols != count or (rows != cols and rows * self.grid[1] != cols * self.grid[0]):
            raise ValueError(
                f"positions of {count} tokens are neither of a square nor of the proportions of "
                f"{self.grid[0]}x{self.grid[1]}: cannot resize them"
            )
        return resize_positions(weight, (rows, cols), self.grid)


def resize_positions(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """[1, L, C] from one token grid to another (bicubic)."""
    resized: Tensor = resample_abs_pos_embed(weight, list(new), list(old), num_prefix_tokens=0)
    return resized
