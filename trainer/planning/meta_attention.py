"""Attention on the meta device with a GPU's kernels: torch would use the math path, which keeps attention matrices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmae.models.ops import sdpa
from mixmae.trainer.planning.op_counter import Workspaces

Device = Literal["cuda", "cpu"]
_aten = torch.ops.aten
_ALIGNED = 16
"""SDPA pads a bias to a multiple of this many columns for the memory-efficient kernel."""
_TILE = 64
"""Rows and columns of a tile in that kernel's backward pass."""
_FLASH_ROWS = 128
"""The flash kernel's backward pass rounds queries up to a multiple of this."""


@contextmanager
def attention_of(device: Device) -> Iterator[None]:
    """Makes attention, with and without a learned bias, use the kernel of a device."""
    original, with_bias, without = F.scaled_dot_product_attention, sdpa.attend, sdpa.attend_unbiased
    F.scaled_dot_product_attention = _CHOICES[device]
    if device == "cpu":
        sdpa.attend, sdpa.attend_unbiased = sdpa.explicit, _unbiased_on_cpu
    try:
        yield
    finally:
        F.scaled_dot_product_attention, sdpa.attend, sdpa.attend_unbiased = original, with_bias, without


def _on_cuda(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **more: Any
) -> Tensor:
    """A learned bias or fp32 excludes the flash kernel; the memory-efficient one is used then."""
    if attn_mask is None and q.dtype != torch.float32:
        return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, **more)[0]
    if attn_mask is not None:
        columns = attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask, (0, -columns % _ALIGNED))[..., :columns].expand(*q.shape[:-1], columns)
    return _aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, **more)[0]


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **more: Any
) -> Tensor:
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, attn_mask=attn_mask, **more)[0]


def _unbiased_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """As `sdpa.attend_unbiased` chooses on a CPU."""
    if q.dtype == torch.bfloat16:
        return sdpa.explicit(q, k, v, mask, q.shape[-1] ** -0.5)
    return _on_cpu(q, k, v, mask)


_CHOICES: dict[Device, Callable[..., Tensor]] = {"cuda": _on_cuda, "cpu": _on_cpu}


def _efficient_backward(
    _: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Tensor, *__: Any, **___: Any
) -> int:
    """Workspace: the query's gradient in fp32 tiles with 16 bytes of locks, a float per row, a contiguous `grad_out`.

    Source: kernel_backward.h in torch's include/ATen/native/transformers/cuda/mem_eff_attention.
    """
    batch, heads, queries, width = q.shape
    tiles = -(-queries // _TILE) * -(-width // _TILE)
    return batch * heads * (tiles * (4 * _TILE**2 + 16) + 4 * queries) + out.numel() * out.element_size()


def _flash_backward(_: Tensor, q: Tensor, *more: Any, **named: Any) -> int:
    """Workspace: the query's gradient in fp32, a float per row, rows padded (flash_api.cpp: dq_accum, softmax_d)."""
    batch, heads, queries, width = q.shape
    return 4 * batch * heads * -(-queries // _FLASH_ROWS) * _FLASH_ROWS * (width + 1)


WORKSPACES: dict[Device, Workspaces] = {
    "cuda": {
        _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
        _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    },
    "cpu": {},
}
