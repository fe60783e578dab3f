"""The decoder: unmixes the encoder's tokens and paints all K images from them (paper section 3.2)."""

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixmae.models.layers.blocks import Block, init_weights, sincos_positions


class Decoder(nn.Module):
    """Pre-norm Transformer over the cell grid; one sequence for each (group, mixed input).

    Args:
        in_dim: width of the encoder's last stage.
        grid: cells (Gh, Gw).
        cell_values: values predicted per cell, pixels times channels.
    """

    positions: Tensor

    def __init__(
        self,
        in_dim: int,
        grid: tuple[int, int],
        cell_values: int,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        if dim % num_heads or dim % 4:
            raise ValueError(f"decoder_dim {dim} does not divide by decoder_num_heads {num_heads} and by 4")
        self.grad_checkpointing = False
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("positions", sincos_positions(grid, dim).flatten(0, 1), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, Attention(dim, num_heads, qkv_bias=True)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.pred = nn.Linear(dim, cell_values)
        self.apply(init_weights)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Predicted cells [K, B, L, values].

        Args:
            tokens: encoder output [B, L, C].
            visible: bool [K, B or 1, L], True where sequence (k, i) keeps the token and False where it is masked.
        """
        x = self.embed(tokens)
        x = torch.where(visible[..., None], x, self.mask_token.to(x.dtype))
        shape = x.shape
        x = x.flatten(0, 1) + self.positions.to(x.dtype)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.pred(self.norm(x)).view(*shape[:3], -1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
