"""Pieces that encoders and the decoder share. Encoder tokens are [B, H, W, C], decoder tokens [B, L, C]."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, build_sincos2d_pos_embed
from torch import Tensor, nn


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sin-cos positions, float32 [*grid, dim]: the column in the first half, the row in the second (MAE)."""
    row, col = build_sincos2d_pos_embed(list(grid), dim, interleave_sin_cos=True).chunk(2, dim=1)
    return torch.cat([col, row], dim=1).view(*grid, dim)


def resized_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions [h, w, C] for another grid (bicubic); themselves where it is theirs."""
    if positions.shape[:2] == grid:
        return positions
    return F.interpolate(positions.permute(2, 0, 1)[None], grid, mode="bicubic")[0].permute(1, 2, 0).contiguous()


class Block(nn.Module):
    """Pre-norm Transformer block around any attention; what else the attention needs is passed through."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, *attention_inputs: object) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), *attention_inputs))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """[B, H, W, C] -> [B, H/2, W/2, 2C]; the block's tokens in the order (row, col) = 00, 10, 01, 11."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.flatten(3)))


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero biases, as in the paper (appendix A.1); for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
