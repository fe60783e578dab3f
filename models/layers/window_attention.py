"""Attention within the problems of an arrangement, with a learned relative-position bias (MixMAE section 3.3).

Shapes: tokens [B, L, C] in the stage's order; h heads of width d.
"""

from collections.abc import Callable

import torch
import torch.fx
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
        if len(arrangement.problems) == 1:
            return self.proj(self._attend(self.qkv(x), arrangement.problems[0]))
        parts = self.qkv(x).split([problems.tokens for problems in arrangement.problems], dim=1)
        out = [self._attend(part, problems) for part, problems in zip(parts, arrangement.problems, strict=True)]
        return self.proj(torch.cat(out, dim=1))

    def set_window(self, window: int) -> None:
        """Another window side; the bias table is resized."""
        table = self.relative_position_bias_table
        if len(table) != (2 * window - 1) ** 2:
            self.relative_position_bias_table = nn.Parameter(resize_table(table.detach(), window))

    def _attend(self, qkv: Tensor, problems: Problems) -> Tensor:
        """[B, num * size, 3C] -> [B, num * size, C]."""
        bias = position_bias(self.relative_position_bias_table, problems.pairs, problems.size)
        one_bias = problems.is_shared
        own_bias = not one_bias or problems.num == 1
        if self.kernel is not None and own_bias and problems.is_dense and _fits(problems.size, qkv):
            return self.kernel(qkv, bias, self.scale)
        qkv = qkv.unflatten(2, (3, self.num_heads, -1)).unflatten(1, (problems.num, problems.size))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        if problems.bias is not None:
            bias = bias + problems.bias
            one_bias = problems.num == 1
        if problems.query_codes is not None and problems.key_codes is not None:
            q, k = _append(q, problems.query_codes), _append(k, problems.key_codes)
        if one_bias:
            out = sdpa.attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias, self.scale)
        else:
            # Problems differ in their bias, samples do not: problems stand beside the heads.
            joint = bias.flatten(0, 1)[None]
            out = sdpa.attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), joint, self.scale)
        width = self.proj.in_features // self.num_heads
        out = out.view(-1, problems.num, self.num_heads, problems.size, width)
        return out.transpose(2, 3).flatten(3).flatten(1, 2)


def _fits(size: int, qkv: Tensor) -> bool:
    return size <= MAX_SIZES.get(qkv.itemsize, 0)


def position_bias(table: Tensor, pairs: Tensor, size: int) -> Tensor:
    """[1 or num, h, size, size] for pairs of positions as in `Problems`."""
    # Not `table[pairs]`: the gradient of that sorts on GPUs, and takes twenty times as long on CPUs. From fp32: the
    # gradient sums hundreds of pairs into an entry, one by one.
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    bias = wide.t().index_select(1, pairs.flatten()).to(table.dtype)
    return bias.view(table.shape[1], -1, size, size).transpose(0, 1)


torch.fx.wrap("position_bias")


def resize_table(table: Tensor, window: int) -> Tensor:
    """A relative-position table [(2w-1)^2, h] for windows of another side (bicubic)."""
    return resize_rel_pos_bias_table_simple(table, (window, window), ((2 * window - 1) ** 2, table.shape[1]))


def _append(x: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([x, codes.expand(*x.shape[:-1], codes.shape[-1])], dim=-1)
