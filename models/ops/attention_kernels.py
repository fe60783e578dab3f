"""How attention kernels are launched: which, on what grid, in how many warps.

Shapes: qkv [B, num * size, 3C]; see `attention_parts`.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mixmae.models.ops import attention_tiled, attention_whole

_PROGRAMS = 1024
"""As many at least, where there is work for them, so that every multiprocessor has several."""
_WHOLE = 64
"""Tokens of the largest problem whose matrix lies in registers, beside its bias' gradient."""


class Tiling(NamedTuple):
    """How a problem is cut: into tiles of queries or keys, each a program of so many warps that its matrices are shared
    among them without being held twice; a program takes `step` of the other ones at a time."""

    tile: int
    step: int
    warps: int


def tiling(size: int) -> Tiling:
    """For problems of up to 256 tokens."""
    if size > _WHOLE:
        return Tiling(64, 32, 4)
    tile = max(16, triton.next_power_of_2(size))
    return Tiling(tile, tile, tile // 16)


def log_sums_shape(qkv: Tensor, num: int, heads: int) -> tuple[int, ...]:
    """Of what `forward` leaves to `backward`; empty where that needs nothing."""
    size = qkv.shape[1] // num
    return (qkv.shape[0] if size > _WHOLE else 0, num, heads, size)


def forward(
    qkv: Tensor, bias: Tensor, num: int, scale: float, window: int = 0, members: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs [B, num * size, C], and logarithms of sums, see `log_sums_shape`.

    Args:
        qkv: its samples may lie apart, but each of them must be contiguous.
        bias: dense, or of windows.
        window: side of the windows that the bias is a table for; 0 for a dense bias.
        members: int32 [period, size]; None where all tokens see each other.
    """
    launch = _Launch(qkv, bias, num, window, members)
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)
    log_sums = qkv.new_empty(log_sums_shape(qkv, num, launch.heads), dtype=torch.float32)
    if launch.is_whole:
        attention_whole.forward_kernel[launch.grid](*launch.inputs, out, *launch.sizes, scale, **launch.settings)
    else:
        kernel = attention_tiled.forward_kernel
        kernel[launch.grid](*launch.inputs, out, log_sums, *launch.sizes, scale, STEP=launch.step, **launch.settings)
    return out, log_sums


def backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    out: Tensor,
    log_sums: Tensor,
    num: int,
    scale: float,
    window: int = 0,
    members: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, packed and contiguous, and of the dense bias in fp32, summed over samples in a fixed order.

    Args:
        out, log_sums: what `forward` gave.
    """
    launch = _Launch(qkv, bias, num, window, members)
    grad, grad_qkv = grad.contiguous(), torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dense = (num, launch.heads, launch.size, launch.size)
    sums = torch.empty(launch.grid[1], *dense, dtype=torch.float32, device=qkv.device)
    sizes, settings = (*launch.sizes, scale), launch.settings
    if launch.is_whole:
        attention_whole.backward_kernel[launch.grid](*launch.inputs, grad, grad_qkv, sums, *sizes, **settings)
    else:
        left, step = (log_sums, torch.empty_like(log_sums)), {"STEP": launch.step}
        queries, keys = attention_tiled.backward_queries_kernel, attention_tiled.backward_keys_kernel
        queries[launch.grid](*launch.inputs, out, grad, grad_qkv, *left, *sizes, **step, **settings)
        keys[launch.grid](*launch.inputs, grad, grad_qkv, *left, *sizes, **step, **settings)
        by_tile = (launch.grid[0] * launch.tiles, launch.grid[1])
        attention_tiled.backward_bias_kernel[by_tile](*launch.inputs, grad, sums, *left, *sizes, **settings)
    return grad_qkv, sums.sum(0)


class _Launch:
    """The grid, and what kernels are called with."""

    def __init__(self, qkv: Tensor, bias: Tensor, num: int, window: int, members: Tensor | None) -> None:
        batch, tokens, triple = qkv.shape
        self.heads, self.size = bias.shape[0 if window else 1], tokens // num
        assert qkv.stride()[1:] == (triple, 1)
        assert tokens == num * self.size
        dense = (num, self.heads, self.size, self.size)
        assert bias.shape == ((self.heads, (2 * window - 1) ** 2) if window else dense)
        assert not window or (num == 1 and self.size == window**2)
        bias = bias.contiguous()
        period = 1
        if members is not None:
            assert members.dtype == torch.int32
            assert members.shape[1] == self.size
            members, period = members.contiguous(), len(members)
        self.inputs = (qkv, bias, bias if members is None else members)
        tile, self.step, warps = tiling(self.size)
        self.is_whole = self.size <= _WHOLE
        self.tiles = triton.cdiv(self.size, tile)
        programs = num * self.heads * self.tiles
        chunk = triton.cdiv(batch, max(1, min(batch, _PROGRAMS // programs)))
        self.grid = (programs, triton.cdiv(batch, chunk))
        self.sizes = (batch, qkv.stride(0), num, self.heads, period, chunk)
        self.settings: dict[str, int] = {
            "SIZE": self.size,
            "WIDTH": triple // 3 // self.heads,
            "TILE": tile,
            "WINDOW": window,
            "MASKED": members is not None,
            "num_warps": warps,
        }
