"""Attention of many small problems with a shared, learned bias in one kernel (Triton), for GPUs.

A global stage sorted by group has problems of L / K tokens, so small that a whole attention matrix lies in registers:
one program takes a problem and a head, loads the bias once, and goes through samples. Nothing of the matrix is ever
written. The bias' gradient is summed over a program's samples in registers, where torch's kernels write it for every
sample and sum it afterwards. Queries, keys and values are read from, and their gradients written to, the packed layout
that the linear layer makes.

Shapes: qkv [B, num * size, 3C], C = heads * width; bias [num, heads, size, size].
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 1024
"""As many at least, where there is work for them, so that every multiprocessor has several."""


@triton.jit
def _softmax(q, k, bias, scale):  # type: ignore[no-untyped-def]
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _addresses(heads, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Of this program's problem and head: the problem's rows, and where a sample's queries and results lie."""
    problem, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    rows = tl.arange(0, BLOCK)
    tokens = (problem * SIZE + rows)[:, None]
    columns = head * WIDTH + tl.arange(0, WIDTH)[None, :]
    return rows, tokens * 3 * heads * WIDTH + columns, tokens * heads * WIDTH + columns


@triton.jit
def _load_packed(at, channels, inside):  # type: ignore[no-untyped-def]
    """Queries, keys and values."""
    q = tl.load(at, mask=inside, other=0.0)
    k = tl.load(at + channels, mask=inside, other=0.0)
    v = tl.load(at + 2 * channels, mask=inside, other=0.0)
    return q, k, v


@triton.jit
def _load_bias(BIAS, rows, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """[BLOCK, BLOCK] in fp32: -inf for keys beyond the problem, 0 for queries beyond it, which are never stored."""
    inside = rows < SIZE
    at = BIAS + tl.program_id(0) * SIZE * SIZE + rows[:, None] * SIZE + rows[None, :]
    bias = tl.load(at, mask=inside[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return tl.where(inside[None, :], bias, float("-inf"))


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    QKV, BIAS, OUT, batch, stride, heads, scale,  # noqa: N803
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """stride: from sample to sample in QKV; its tokens, and OUT, are contiguous."""
    channels = heads * WIDTH
    rows, own, own_out = _addresses(heads, SIZE, WIDTH, BLOCK)
    inside = (rows < SIZE)[:, None]
    bias = _load_bias(BIAS, rows, SIZE)
    first = tl.program_id(1) * CHUNK
    stride_out = tl.num_programs(0) // heads * SIZE * channels
    at = QKV + first.to(tl.int64) * stride + own
    to = OUT + first.to(tl.int64) * stride_out + own_out
    for _ in range(first, tl.minimum(first + CHUNK, batch)):
        q, k, v = _load_packed(at, channels, inside)
        weights = _softmax(q, k, bias, scale)
        out = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        tl.store(to, out.to(OUT.dtype.element_ty), mask=inside)
        at += stride
        to += stride_out


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    QKV, BIAS, GRAD, GRAD_QKV, GRAD_BIAS, batch, stride, heads, scale,  # noqa: N803
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """GRAD and GRAD_QKV are contiguous; GRAD_BIAS [chunks, num, heads, size, size] holds a sum for each chunk."""
    channels = heads * WIDTH
    rows, own, own_out = _addresses(heads, SIZE, WIDTH, BLOCK)
    inside = (rows < SIZE)[:, None]
    bias = _load_bias(BIAS, rows, SIZE)
    grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
    first = tl.program_id(1) * CHUNK
    stride_out = tl.num_programs(0) // heads * SIZE * channels
    at = QKV + first.to(tl.int64) * stride + own
    at_grad = GRAD + first.to(tl.int64) * stride_out + own_out
    to = GRAD_QKV + first.to(tl.int64) * 3 * stride_out + own
    for _ in range(first, tl.minimum(first + CHUNK, batch)):
        q, k, v = _load_packed(at, channels, inside)
        grad = tl.load(at_grad, mask=inside, other=0.0)
        weights = _softmax(q, k, bias, scale)
        grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        inner = tl.sum(weights * grad_weights, 1)
        grad_logits = weights * (grad_weights - inner[:, None])
        grad_bias += grad_logits
        grad_v = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
        narrow = grad_logits.to(q.dtype)
        grad_q = tl.dot(narrow, k, input_precision="ieee") * scale
        grad_k = tl.dot(tl.trans(narrow), q, input_precision="ieee") * scale
        tl.store(to, grad_q.to(q.dtype), mask=inside)
        tl.store(to + channels, grad_k.to(q.dtype), mask=inside)
        tl.store(to + 2 * channels, grad_v.to(q.dtype), mask=inside)
        at += stride
        at_grad += stride_out
        to += 3 * stride_out
    chunk = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    at_bias = GRAD_BIAS + chunk * SIZE * SIZE + rows[:, None] * SIZE + rows[None, :]
    tl.store(at_bias, grad_bias, mask=inside & (rows < SIZE)[None, :])


@torch.library.custom_op("mixmae::grouped_attention", mutates_args=())
def grouped_attention(qkv: Tensor, bias: Tensor, scale: float) -> Tensor:
    """[B, num * size, C].

    Args:
        qkv: its samples may lie apart, but each of them must be contiguous.
        bias: of qkv's dtype, without a batch dimension.
    """
    num, heads, size, _ = bias.shape
    batch, tokens, triple = qkv.shape
    assert qkv.stride()[1:] == (triple, 1)
    assert tokens == num * size
    out = qkv.new_empty(batch, tokens, triple // 3)
    grid, settings = _launch(batch, bias, triple)
    _forward[grid](qkv, bias.contiguous(), out, batch, qkv.stride(0), heads, scale, **settings)
    return out


@grouped_attention.register_fake
def _(qkv: Tensor, bias: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


@torch.library.custom_op("mixmae::grouped_attention_backward", mutates_args=())
def _grouped_attention_backward(grad: Tensor, qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, _, triple = qkv.shape
    grid, settings = _launch(batch, bias, triple)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    sums = torch.empty(grid[1], *bias.shape, dtype=torch.float32, device=qkv.device)
    where = (qkv, bias.contiguous(), grad.contiguous(), grad_qkv, sums)
    _backward[grid](*where, batch, qkv.stride(0), bias.shape[1], scale, **settings)
    return grad_qkv, sums.sum(0).to(bias.dtype)


@_grouped_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), bias.new_empty(bias.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    qkv, bias, ctx.scale = inputs
    ctx.save_for_backward(qkv, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_grouped_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None)


grouped_attention.register_autograd(_differentiate, setup_context=_keep)


def _launch(batch: int, bias: Tensor, triple: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and what the kernels are compiled for."""
    num, heads, size, _ = bias.shape
    chunks = max(1, min(batch, _PROGRAMS // (num * heads)))
    chunk = triton.cdiv(batch, chunks)
    block = max(16, triton.next_power_of_2(size))
    settings = {"SIZE": size, "WIDTH": triple // 3 // heads, "BLOCK": block, "CHUNK": chunk}
    return (num * heads, triton.cdiv(batch, chunk)), {**settings, "num_warps": warps(block)}


def warps(block: int) -> int:
    """So many that a block's matrices are shared among them without being held twice, and lie in registers."""
    return {16: 1, 32: 2, 64: 4}.get(block, 8)
