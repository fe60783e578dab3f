"""Window attention that keeps groups apart (MixMAE section 3.3, "masked self-attention").

Shapes: tokens [B, H, W, C]; window side w, N = w*w tokens in a window, Wn = H*W / N windows, h heads of width d.
A separation says which tokens may see each other: same group, visible; other group, invisible.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from models.mixing import upsample_groups

# Product of a query's code with a key's code of another group. Scaled by 1/sqrt(d) it still drives exp() to exactly 0
# in every dtype that has fp32's range.
_INVISIBLE = -1e4
# Codes are padded to this width: K is at most 5, and fused kernels want head widths that are multiples of 8.
_CODE_WIDTH = 8


class Separation(NamedTuple):
    """Group separation of one stage, in the form that costs least; exactly one of the two kinds is present.

    bias: [Wn, 1, N, N], 0 within a group and -inf across, for one map shared by the micro-batch.
    query_codes, key_codes: [B, Wn, 1, N, 8], for one map per sample: extra head dimensions whose product is 0 within
        a group and hugely negative across, so that no mask the size of the attention matrix is ever made.
    """

    bias: Tensor | None = None
    query_codes: Tensor | None = None
    key_codes: Tensor | None = None


def separate(groups: Tensor, grid: tuple[int, int], window: int, dtype: torch.dtype) -> Separation:
    """The separation of a stage with token grid `grid`, from `groups` [Gh, Gw] or [B, Gh, Gw]."""
    members = to_windows(upsample_groups(groups, grid)[..., None], window).squeeze(-1)
    if groups.dim() == 2:
        same = members[:, :, None] == members[:, None, :]
        bias = torch.zeros(same.shape, dtype=dtype, device=groups.device).masked_fill_(~same, float("-inf"))
        return Separation(bias=bias[:, None])
    own = F.one_hot(members, _CODE_WIDTH).to(dtype)[:, :, None]
    return Separation(query_codes=own, key_codes=(1 - own) * _INVISIBLE)


def to_windows(x: Tensor, window: int) -> Tensor:
    """[..., H, W, C] -> [..., Wn, N, C]."""
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height // window, window, width // window, window, channels)
    return x.transpose(-4, -3).reshape(*lead, -1, window * window, channels)


def relative_position_index(window: int) -> Tensor:
    """[N*N] rows of the bias table [(2w-1)^2, h]: query-minus-key offset, row-major (Swin, section 3.2)."""
    axis = torch.arange(window)
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
    offset = position[:, :, None] - position[:, None, :] + window - 1
    return (offset[0] * (2 * window - 1) + offset[1]).flatten()


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows of side `window`; a window as large as the map is global attention."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed dim {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.window = window
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)

    def forward(self, x: Tensor, separation: Separation | None = None) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        batch, height, width, dim = x.shape
        rows, cols, w, heads = height // self.window, width // self.window, self.window, self.num_heads
        qkv = self.qkv(x).view(batch, rows, w, cols, w, 3, heads, dim // heads)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch, rows * cols, heads, w * w, dim // heads)
        q, k, v = qkv.unbind(0)
        out = self._attend(q, k, v, separation).view(batch, rows, cols, heads, w, w, dim // heads)
        return self.proj(out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, dim))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, separation: Separation | None) -> Tensor:
        """[B, Wn, h, N, d] each -> [B, Wn, h, N, d]; the bias broadcasts over what stands in the first dimension."""
        bias = self._position_bias()
        if separation is None:
            return self._sdpa(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias[None]).view(q.shape)
        if separation.bias is not None:
            # Windows differ in their separation, samples do not: windows stand beside the heads.
            joint = (bias + separation.bias).flatten(0, 1)[None]
            return self._sdpa(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), joint).view(q.shape)
        assert separation.query_codes is not None
        assert separation.key_codes is not None
        q = _append(q, separation.query_codes).flatten(0, 1)
        k = _append(k, separation.key_codes).flatten(0, 1)
        return self._sdpa(q, k, v.flatten(0, 1), bias[None]).view(v.shape)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)

    def _position_bias(self) -> Tensor:
        """[h, N, N]."""
        tokens = self.window * self.window
        bias = self.relative_position_bias_table[self.relative_position_index]
        return bias.view(tokens, tokens, self.num_heads).permute(2, 0, 1)


def _append(x: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([x, codes.expand(*x.shape[:-1], codes.shape[-1])], dim=-1)
