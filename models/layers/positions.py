"""Learned positions of a token grid."""

import torch
from timm.layers import resample_abs_pos_embed_nhwc
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
    """[1, L, C] from one token grid to another (bicubic), which may have as many tokens."""
    resized: Tensor = resample_abs_pos_embed_nhwc(weight.unflatten(1, old), list(new))
    return resized.flatten(1, 2)


def resize_all_positions(
    encoder: nn.Module, state: dict[str, Tensor], cells: tuple[int, int], own_cells: tuple[int, int]
) -> dict[str, Tensor]:
    """An encoder's state for images of `cells`, with learned positions resized (bicubic) to those of its own.

    Weights alone do not say how many rows their positions have. Those of as many tokens as `cells` make are resized.
    """
    state = dict(state)
    for name, module in encoder.named_modules():
        weight = state.get(f"{name}.weight")
        if isinstance(module, LearnedPositions) and weight is not None and weight.dim() == 3:
            rows, cols = (side * theirs // own for side, theirs, own in zip(module.grid, cells, own_cells, strict=True))
            if rows * cols == weight.shape[1]:
                state[f"{name}.weight"] = resize_positions(weight, (rows, cols), module.grid)
    return state
