"""Attention inside windows with a learned relative-position bias in one kernel, for GPUs.

The bias is looked up in its small table, and its gradient summed in fp32 in an order that does not change: the same
gradients come out bit for bit. Neither a dense bias nor a mask is made.

Shapes: qkv [B, num * w^2, 3C], num windows of side w one after another, row by row inside; table [(2w - 1)^2, heads];
members int32 [1 or B, num, w^2], the group that each token is in, where groups are kept apart.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmae.models.ops import attention_kernels


def window_attention(qkv: Tensor, table: Tensor, members: Tensor | None, scale: float) -> Tensor:
    """[B, num * w^2, C]."""
    return _forward(qkv, table, members, scale)[0]


@torch.library.custom_op("mixmae::window_attention", mutates_args=())
def _forward(qkv: Tensor, table: Tensor, members: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    window = _side(table)
    out, log_sums = attention_kernels.forward(_windows(qkv, window), table.t(), 1, scale, window, _rows(members))
    return out.view(*qkv.shape[:2], -1), log_sums


@_forward.register_fake
def _(qkv: Tensor, table: Tensor, members: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    shape = attention_kernels.log_sums_shape(_windows(qkv, _side(table)), 1, table.shape[1])
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3), qkv.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("mixmae::window_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, qkv: Tensor, table: Tensor, members: Tensor | None, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    window = _side(table)
    grads, packed = _windows(grad, window), _windows(qkv, window)
    grad_qkv, grad_bias = attention_kernels.backward(
        grads, packed, table.t(), out, log_sums, 1, scale, window, _rows(members)
    )
    return grad_qkv.view(qkv.shape), table_gradient(grad_bias[0]).to(table.dtype)


@_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, table: Tensor, members: Tensor | None, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), torch.empty_like(table)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]) -> None:
    qkv, table, members, ctx.scale = inputs
    ctx.save_for_backward(qkv, table, members, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, Tensor, None, None]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


def table_gradient(grad_bias: Tensor) -> Tensor:
    """The table's [(2w - 1)^2, heads] for a dense bias' [heads, w^2, w^2]: sums in an order that does not change, where
    `index_add` on GPUs adds as it comes."""
    heads, size, _ = grad_bias.shape
    side = round(size**0.5)
    pairs = grad_bias.view(heads, side, side, side, side)  # row and column of the query, of the key
    by_column = _diagonal_sums(pairs.transpose(2, 3))  # [heads, row, row, 2w - 1]
    return _diagonal_sums(by_column.movedim(3, 1)).mT.flatten(1).t().contiguous()


def _diagonal_sums(x: Tensor) -> Tensor:
    """[..., w, w] -> [..., 2w - 1]: sums over all i, j with the same i - j, which come out at i - j + w - 1."""
    side = x.shape[-1]
    # Read with one column less than they were written with, rows come out each one further to the right.
    skewed = F.pad(x.flip(-1), (0, side)).flatten(-2)[..., :-side]
    return skewed.unflatten(-1, (side, 2 * side - 1)).sum(-2)


def _side(table: Tensor) -> int:
    return (round(len(table) ** 0.5) + 1) // 2


def _windows(x: Tensor, window: int) -> Tensor:
    """[B, num * w^2, ...] -> [B * num, w^2, ...]: windows are samples to the kernels."""
    return x.reshape(-1, window**2, x.shape[-1])


def _rows(members: Tensor | None) -> Tensor | None:
    return None if members is None else members.flatten(0, 1)
