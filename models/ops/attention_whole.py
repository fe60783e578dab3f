"""Attention of problems of up to 64 tokens: the whole matrix of a problem and head lies in registers.

A program takes a problem and a head, loads the bias once, and goes through samples. Nothing of the matrix is ever
written, and the bias' gradient is summed over a program's samples in registers, in a fixed order, where torch's kernels
write it for every sample and sum it afterwards. Shapes: see `attention_parts`.
"""

# ruff: noqa: N803

import triton
import triton.language as tl

from mixmae.models.ops.attention_parts import hide, load, load_bias, load_members, load_packed, place, store, store_sum


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    q, k, bias, scale, MEMBERS, item, period, tokens, SIZE: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias.to(tl.float32)
    if MASKED:
        members = load_members(MEMBERS, item, period, tokens, SIZE, MASKED)
        logits = hide(logits, tokens[:, None], members[:, None], members[None, :], SIZE)
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    QKV, BIAS, MEMBERS, OUT, batch, stride, num, heads, period, chunk, scale,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """stride: from sample to sample in QKV; its tokens, and OUT, are contiguous."""
    problem, head, tokens = place(heads, SIZE, TILE)
    channels = heads * WIDTH
    bias = load_bias(BIAS, tokens[:, None], tokens[None, :], problem * heads + head, SIZE, WINDOW)
    first = tl.program_id(1) * chunk
    for item in range(first, tl.minimum(first + chunk, batch)):
        wide = tl.cast(item, tl.int64)
        at = QKV + wide * stride + problem * SIZE * 3 * channels + head * WIDTH
        q, k, v = load_packed(at, tokens, channels, SIZE, WIDTH)
        weights = _weights(q, k, bias, scale, MEMBERS, item, period, tokens, SIZE, MASKED)
        out = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        to = OUT + (wide * num + problem) * SIZE * channels + head * WIDTH
        store(to, tokens, channels, out, SIZE, WIDTH)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    QKV, BIAS, MEMBERS, GRAD, GRAD_QKV, GRAD_BIAS, batch, stride, num, heads, period, chunk, scale,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """GRAD and GRAD_QKV are contiguous; GRAD_BIAS [chunks, num, heads, size, size] holds a sum for each chunk."""
    problem, head, tokens = place(heads, SIZE, TILE)
    channels = heads * WIDTH
    bias = load_bias(BIAS, tokens[:, None], tokens[None, :], problem * heads + head, SIZE, WINDOW)
    grad_bias = tl.zeros([TILE, TILE], tl.float32)
    first = tl.program_id(1) * chunk
    for item in range(first, tl.minimum(first + chunk, batch)):
        wide = tl.cast(item, tl.int64)
        at = QKV + wide * stride + problem * SIZE * 3 * channels + head * WIDTH
        q, k, v = load_packed(at, tokens, channels, SIZE, WIDTH)
        own = (wide * num + problem) * SIZE * channels
        grad = load(GRAD + own + head * WIDTH, tokens, channels, SIZE, WIDTH)
        weights = _weights(q, k, bias, scale, MEMBERS, item, period, tokens, SIZE, MASKED)
        grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        inner = tl.sum(weights * grad_weights, 1)
        grad_logits = weights * (grad_weights - inner[:, None])
        grad_bias += grad_logits
        narrow = grad_logits.to(q.dtype)
        to = GRAD_QKV + 3 * own + head * WIDTH
        grad_v = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
        store(to + 2 * channels, tokens, 3 * channels, grad_v, SIZE, WIDTH)
        grad_q = tl.dot(narrow, k, input_precision="ieee") * scale
        store(to, tokens, 3 * channels, grad_q, SIZE, WIDTH)
        grad_k = tl.dot(tl.trans(narrow), q, input_precision="ieee") * scale
        store(to + channels, tokens, 3 * channels, grad_k, SIZE, WIDTH)
    number = (tl.program_id(1) * num + problem) * heads + head
    store_sum(GRAD_BIAS, number, tokens, tokens, grad_bias, SIZE)
