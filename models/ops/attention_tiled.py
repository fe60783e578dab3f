"""Attention of problems of up to 256 tokens, in tiles of 64 queries by 32 keys (FlashAttention, Dao 2023).

A program takes a problem, a head and 64 queries, or keys, and goes through samples. The backward pass has a kernel for
the gradients of queries, one for those of keys and values, and one for that of the bias: a program of it keeps to one
tile, whose sum over samples lies in registers, and has a fixed order. Shapes: see `attention_parts`.
"""

# ruff: noqa: N803

import triton
import triton.language as tl

from mixmae.models.ops.attention_parts import hide, load, load_bias, load_members, place, store, store_sum


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    QKV, BIAS, MEMBERS, OUT, LOG_SUMS, batch, stride, num, heads, period, chunk, scale,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """stride: from sample to sample in QKV; its tokens, and OUT, are contiguous. LOG_SUMS [B, num, heads, size] is left
    to the backward pass: the logarithm of what a query's weights were divided by."""
    problem, head, queries = place(heads, SIZE, TILE)
    channels = heads * WIDTH
    first = tl.program_id(1) * chunk
    for item in range(first, tl.minimum(first + chunk, batch)):
        wide = tl.cast(item, tl.int64)
        at = QKV + wide * stride + problem * SIZE * 3 * channels + head * WIDTH
        q = load(at, queries, 3 * channels, SIZE, WIDTH)
        query_members = load_members(MEMBERS, item, period, queries, SIZE, MASKED)
        top = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        out = tl.zeros([TILE, WIDTH], tl.float32)
        for start in range(0, SIZE, STEP):
            keys = start + tl.arange(0, STEP)
            k = load(at + channels, keys, 3 * channels, SIZE, WIDTH)
            v = load(at + 2 * channels, keys, 3 * channels, SIZE, WIDTH)
            bias = load_bias(BIAS, queries[:, None], keys[None, :], problem * heads + head, SIZE, WINDOW)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
            if MASKED:
                key_members = load_members(MEMBERS, item, period, keys, SIZE, MASKED)
                logits = hide(logits, queries[:, None], query_members[:, None], key_members[None, :], SIZE)
            higher = tl.maximum(top, tl.max(logits, 1))
            against = tl.where(higher == float("-inf"), 0.0, higher)  # of queries that have seen no key yet
            weights = tl.exp(logits - against[:, None])
            shrunk = tl.exp(top - against)
            total = total * shrunk + tl.sum(weights, 1)
            out = out * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = higher
        to = OUT + (wide * num + problem) * SIZE * channels + head * WIDTH
        store(to, queries, channels, out / total[:, None], SIZE, WIDTH)
        row = ((wide * num + problem) * heads + head) * SIZE + queries
        tl.store(LOG_SUMS + row, top + tl.log(total), mask=queries < SIZE)


@triton.jit
def _grad_logits(  # type: ignore[no-untyped-def]
    q, k, v, grad, bias, log_sum, inner, scale, queries, query_members, key_members,
    SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[queries, keys] in fp32."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
    if MASKED:
        logits = hide(logits, queries[:, None], query_members[:, None], key_members[None, :], SIZE)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    return tl.exp(logits - log_sum[:, None]) * (grad_weights - inner[:, None])


@triton.jit
def backward_queries_kernel(  # type: ignore[no-untyped-def]
    QKV, BIAS, MEMBERS, OUT, GRAD, GRAD_QKV, LOG_SUMS, INNERS, batch, stride, num, heads, period, chunk, scale,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """OUT, GRAD and GRAD_QKV are contiguous; INNERS [B, num, heads, size], each query's output times its gradient, is
    left to the other kernels."""
    problem, head, queries = place(heads, SIZE, TILE)
    channels, problem_head = heads * WIDTH, problem * heads + head
    first = tl.program_id(1) * chunk
    for item in range(first, tl.minimum(first + chunk, batch)):
        wide = tl.cast(item, tl.int64)
        at = QKV + wide * stride + problem * SIZE * 3 * channels + head * WIDTH
        own = (wide * num + problem) * SIZE * channels
        q = load(at, queries, 3 * channels, SIZE, WIDTH)
        grad = load(GRAD + own + head * WIDTH, queries, channels, SIZE, WIDTH)
        out = load(OUT + own + head * WIDTH, queries, channels, SIZE, WIDTH)
        row = ((wide * num + problem) * heads + head) * SIZE + queries
        log_sum = tl.load(LOG_SUMS + row, mask=queries < SIZE, other=0.0)
        inner = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        tl.store(INNERS + row, inner, mask=queries < SIZE)
        query_members = load_members(MEMBERS, item, period, queries, SIZE, MASKED)
        grad_q = tl.zeros([TILE, WIDTH], tl.float32)
        for start in range(0, SIZE, STEP):
            keys = start + tl.arange(0, STEP)
            k = load(at + channels, keys, 3 * channels, SIZE, WIDTH)
            v = load(at + 2 * channels, keys, 3 * channels, SIZE, WIDTH)
            bias = load_bias(BIAS, queries[:, None], keys[None, :], problem_head, SIZE, WINDOW)
            key_members = load_members(MEMBERS, item, period, keys, SIZE, MASKED)
            grad_logits = _grad_logits(
                q, k, v, grad, bias, log_sum, inner, scale, queries, query_members, key_members, SIZE, MASKED
            )
            grad_q += tl.dot(grad_logits.to(q.dtype), k, input_precision="ieee")
        store(GRAD_QKV + 3 * own + head * WIDTH, queries, 3 * channels, grad_q * scale, SIZE, WIDTH)


@triton.jit
def backward_bias_kernel(  # type: ignore[no-untyped-def]
    QKV, BIAS, MEMBERS, GRAD, GRAD_BIAS, LOG_SUMS, INNERS, batch, stride, num, heads, period, chunk, scale,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of queries by a tile of keys; GRAD_BIAS [chunks, num, heads, size, size] holds a sum for
    each chunk."""
    tiles: tl.constexpr = (SIZE + TILE - 1) // TILE
    problem_head, tile = tl.program_id(0) // (tiles * tiles), tl.program_id(0) % (tiles * tiles)
    problem, head, channels = problem_head // heads, problem_head % heads, heads * WIDTH
    queries = tile // tiles * TILE + tl.arange(0, TILE)
    keys = tile % tiles * TILE + tl.arange(0, TILE)
    bias = load_bias(BIAS, queries[:, None], keys[None, :], problem_head, SIZE, WINDOW)
    grad_bias = tl.zeros([TILE, TILE], tl.float32)
    first = tl.program_id(1) * chunk
    for item in range(first, tl.minimum(first + chunk, batch)):
        wide = tl.cast(item, tl.int64)
        at = QKV + wide * stride + problem * SIZE * 3 * channels + head * WIDTH
        q = load(at, queries, 3 * channels, SIZE, WIDTH)
        k = load(at + channels, keys, 3 * channels, SIZE, WIDTH)
        v = load(at + 2 * channels, keys, 3 * channels, SIZE, WIDTH)
        grad = load(GRAD + (wide * num + problem) * SIZE * channels + head * WIDTH, queries, channels, SIZE, WIDTH)
        row = ((wide * num + problem) * heads + head) * SIZE + queries
        log_sum = tl.load(LOG_SUMS + row, mask=queries < SIZE, other=0.0)
        inner = tl.load(INNERS + row, mask=queries < SIZE, other=0.0)
        query_members = load_members(MEMBERS, item, period, queries, SIZE, MASKED)
        key_members = load_members(MEMBERS, item, period, keys, SIZE, MASKED)
        grad_bias += _grad_logits(
            q, k, v, grad, bias, log_sum, inner, scale, queries, query_members, key_members, SIZE, MASKED
        )
    store_sum(GRAD_BIAS, tl.program_id(1) * num * heads + problem_head, queries, keys, grad_bias, SIZE)


@triton.jit
def backward_keys_kernel(  # type: ignore[no-untyped-def]
    QKV, BIAS, MEMBERS, GRAD, GRAD_QKV, LOG_SUMS, INNERS, batch, stride, num, heads, period, chunk, scale,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Queries beyond the problem have no gradient, and add nothing."""
    problem, head, keys = place(heads, SIZE, TILE)
    channels, problem_head = heads * WIDTH, problem * heads + head
    first = tl.program_id(1) * chunk
    for item in range(first, tl.minimum(first + chunk, batch)):
        wide = tl.cast(item, tl.int64)
        at = QKV + wide * stride + problem * SIZE * 3 * channels + head * WIDTH
        own = (wide * num + problem) * SIZE * channels
        k = load(at + channels, keys, 3 * channels, SIZE, WIDTH)
        v = load(at + 2 * channels, keys, 3 * channels, SIZE, WIDTH)
        key_members = load_members(MEMBERS, item, period, keys, SIZE, MASKED)
        grad_k = tl.zeros([TILE, WIDTH], tl.float32)
        grad_v = tl.zeros([TILE, WIDTH], tl.float32)
        for start in range(0, SIZE, STEP):
            queries = start + tl.arange(0, STEP)
            q = load(at, queries, 3 * channels, SIZE, WIDTH)
            grad = load(GRAD + own + head * WIDTH, queries, channels, SIZE, WIDTH)
            row = ((wide * num + problem) * heads + head) * SIZE + queries
            log_sum = tl.load(LOG_SUMS + row, mask=queries < SIZE, other=0.0)
            inner = tl.load(INNERS + row, mask=queries < SIZE, other=0.0)
            bias = load_bias(BIAS, queries[None, :], keys[:, None], problem_head, SIZE, WINDOW)
            logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale + bias
            if MASKED:
                query_members = load_members(MEMBERS, item, period, queries, SIZE, MASKED)
                logits = hide(logits, queries[None, :], query_members[None, :], key_members[:, None], SIZE)
            weights = tl.exp(logits - log_sum[None, :])
            grad_v += tl.dot(weights.to(grad.dtype), grad, input_precision="ieee")
            grad_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
            grad_logits = weights * (grad_weights - inner[None, :])
            grad_k += tl.dot(grad_logits.to(q.dtype), q, input_precision="ieee")
        to = GRAD_QKV + 3 * own + head * WIDTH
        store(to + channels, keys, 3 * channels, grad_k * scale, SIZE, WIDTH)
        store(to + 2 * channels, keys, 3 * channels, grad_v, SIZE, WIDTH)
