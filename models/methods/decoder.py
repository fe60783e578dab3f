"""The decoder: unmixes the encoder's tokens and paints all K images from them (paper section 3.2)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixmae.models.layers.blocks import Block, init_weights, sincos_positions

_LARGE, _SMALL = 75e6, 10e6
"""Parameters of an encoder: from the first on it is a base size or larger, below the second a toy."""
_HEAD_DIM = 32


class DecoderSizes(NamedTuple):
    dim: int
    depth: int
    num_heads: int


def decoder_sizes(
    encoder: nn.Module, dim: int | None = None, depth: int | None = None, num_heads: int | None = None
) -> DecoderSizes:
    """What is given, and for the rest what fits the encoder: the papers' 512 x 8 for base sizes and larger.

    A decoder works on K sequences for each mixed input: at 512 x 8 it would take most of a small encoder's step.
    """
    count = sum(parameter.numel() for parameter in encoder.parameters())
    fitting = (512, 8) if count >= _LARGE else (256, 4) if count >= _SMALL else (64, 4)
    dim, depth = dim or fitting[0], depth or fitting[1]
    wanted = max(1, dim // _HEAD_DIM)
    return DecoderSizes(dim, depth, num_heads or max(n for n in range(1, wanted + 1) if dim % n == 0))


def fit_decoder(settings: Mapping[str, Any], encoder: nn.Module) -> dict[str, Any]:
    """A method's settings with the decoder's sizes that it leaves to the encoder."""
    names = ("decoder_dim", "decoder_depth", "decoder_num_heads")
    sizes = decoder_sizes(encoder, *(settings[name] for name in names))
    return {**settings, **dict(zip(names, sizes, strict=True))}


class Decoder(nn.Module):
    """Pre-norm Transformer over the cell grid; one sequence for each (group, mixed input).

    Args:
        in_dim: width of the encoder's last stage.
        grid: cells (Gh, Gw).
        cell_values: values predicted per cell, pixels times channels.
        norm_eps: of all its LayerNorms.
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
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if dim % num_heads or dim % 4:
            raise ValueError(f"decoder_dim {dim} does not divide by decoder_num_heads {num_heads} and by 4")
        self.grad_checkpointing = False
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("positions", sincos_positions(grid, dim).flatten(0, 1), persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, Attention(dim, num_heads, qkv_bias=True), norm_eps=norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, norm_eps)
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
        x = self._run(x.flatten(0, 1) + self.positions.to(x.dtype))
        return self.pred(self.norm(x)).view(*shape[:3], -1)

    def _run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable


class KeptDecoder(Decoder):
    """The same for tokens of kept cells alone: mask tokens stand in the places of the others (MAE, section 3)."""

    def forward(self, tokens: Tensor, order: Tensor, num_prefix: int = 0) -> Tensor:
        """Predicted cells [B, L, values].

        Args:
            tokens: encoder output [B, num_prefix + n, C]; those before the cells have no position, and predict nothing.
            order: int64 [B or 1, L], the cells, kept ones first, in the order of their tokens.
        """
        x = self.embed(tokens)
        masked = order.shape[1] - (tokens.shape[1] - num_prefix)
        cells = torch.cat([x[:, num_prefix:], self.mask_token.to(x.dtype).expand(len(x), masked, -1)], dim=1)
        place = order.argsort(dim=1)[..., None].expand(len(x), -1, x.shape[-1])
        cells = cells.gather(1, place) + self.positions.to(x.dtype)
        x = self._run(torch.cat([x[:, :num_prefix], cells], dim=1))
        return self.pred(self.norm(x[:, num_prefix:]))
