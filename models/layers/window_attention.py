"""Attention within the problems of an arrangement, with a learned relative-position bias (MixMAE section 3.3).

Shapes: tokens [B, L, C] in the stage's order; h heads of width d.
"""

from collections.abc import Callable

import torch
from timm.layers import resize_rel_pos_bias_table_simple
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from mixmae.models.layers.token_order import Arrangement, Problems
from mixmae.models.ops import sdpa

MAX_SIZES = {2: 128, 4: 64}
"""By bytes of an element: tokens of a problem whose attention matrix lies in a GPU's registers, and what its products
read in shared memory."""
Kernel = Callable[[Tensor, Tensor, float], Tensor]
"""Packed queries, keys and values [B, num * size, 3C], bias [num, h, size, size], and scale to [B, num * size, C]."""


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows of side `window`; a window as large as the map is global attention."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed dim {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.kernel: Kernel | None = None
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, arrangement: Arrangement) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        parts = self.qkv(x).split([problems.tokens for problems in arrangement.problems], dim=1)
        out = [self._attend(part, problems) for part, problems in zip(parts, arrangement.problems, strict=True)]
        return self.proj(out[0] if len(out) == 1 else torch.cat(out, dim=1))

    def set_window(self, window: int) -> None:
        """Another window side; the bias table is resized."""
        table = resize_table(self.relative_position_bias_table.detach(), window)
        self.relative_position_bias_table = nn.Parameter(table)

    def _attend(self, qkv: Tensor, problems: Problems) -> Tensor:
        """[B, num * size, 3C] -> [B, num * size, C]."""
        bias = self._position_bias(problems)
        fits = problems.size <= MAX_SIZES.get(qkv.itemsize, 0)
        if self.kernel is not None and len(bias) == problems.num and fits and problems.is_dense:
            return self.kernel(qkv, bias, self.scale)
        batch, tokens, triple = qkv.shape
        heads, width = self.num_heads, triple // 3 // self.num_heads
        q, k, v = qkv.view(batch, problems.num, problems.size, 3, heads, width).permute(3, 0, 1, 4, 2, 5)
        if problems.bias is not None:
            bias = bias + problems.bias
        if problems.query_codes is not None and problems.key_codes is not None:
            q, k = _append(q, problems.query_codes), _append(k, problems.key_codes)
        if len(bias) == 1:
            out = sdpa.attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias, self.scale)
        else:
            # Problems differ in their bias, samples do not: problems stand beside the heads.
            joint = bias.flatten(0, 1)[None]
            out = sdpa.attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), joint, self.scale)
        return out.view(batch, problems.num, heads, problems.size, width).transpose(2, 3).reshape(batch, tokens, -1)

    def _position_bias(self, problems: Problems) -> Tensor:
        """[1 or num, h, size, size]."""
        # Not `table[pairs]`: the gradient of that sorts on GPUs, and takes twenty times as long on CPUs. From fp32: the
        # gradient sums hundreds of pairs into an entry, one by one.
        table = self.relative_position_bias_table
        wide = table.to(torch.promote_types(table.dtype, torch.float32))
        bias = wide.t().index_select(1, problems.pairs.flatten()).to(table.dtype)
        return bias.view(-1, len(problems.pairs), problems.size, problems.size).transpose(0, 1)


def resize_table(table: Tensor, window: int) -> Tensor:
    """A relative-position table [(2w-1)^2, h] for windows of another side (bicubic)."""
    return resize_rel_pos_bias_table_simple(table, (window, window), ((2 * window - 1) ** 2, table.shape[1]))


def _append(x: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([x, codes.expand(*x.shape[:-1], codes.shape[-1])], dim=-1)
