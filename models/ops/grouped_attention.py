"""Attention of problems with a bias of their own in one kernel, for GPUs: the global stages, sorted by group.

Shapes: qkv [B, num * size, 3C]; bias [num, heads, size, size], problems of up to 128 tokens.
"""

from typing import Any

import torch
from torch import Tensor

from mixmae.models.ops import attention_kernels


def grouped_attention(qkv: Tensor, bias: Tensor, scale: float) -> Tensor:
    """[B, num * size, C].

    Args:
        qkv: its samples may lie apart, but each of them must be contiguous.
        bias: of qkv's dtype, without a batch dimension.
    """
    return _forward(qkv, bias, scale)[0]


@torch.library.custom_op("mixmae::grouped_attention", mutates_args=())
def _forward(qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return attention_kernels.forward(qkv, bias, len(bias), scale)


@_forward.register_fake
def _(qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    shape = attention_kernels.log_sums_shape(qkv, *bias.shape[:2])
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3), qkv.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("mixmae::grouped_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    grad_qkv, grad_bias = attention_kernels.backward(grad, qkv, bias, out, log_sums, len(bias), scale)
    return grad_qkv, grad_bias.to(bias.dtype)


@_backward.register_fake
def _(grad: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, log_sums: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), bias.new_empty(bias.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, ctx.scale = inputs
    ctx.save_for_backward(qkv, bias, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, Tensor, None]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.scale), None)


_forward.register_autograd(_differentiate, setup_context=_keep)
