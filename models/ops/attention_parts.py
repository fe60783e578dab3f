"""What attention kernels share: where a program's tokens lie, the bias of their pairs, which of them see each other.

Shapes: qkv [B, num * size, 3C], queries, keys and values packed as a linear layer makes them, C = heads * width. The
bias is dense, [num, heads, size, size], or a table of relative positions in a window, [heads, (2w - 1)^2], then num is
1. Members [period, size], sample by sample, say which group a token is in: it sees its own group alone.
"""

# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def place(heads, SIZE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of this program: its problem, its head, the tokens of its tile."""
    tiles: tl.constexpr = (SIZE + TILE - 1) // TILE
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    return rest // heads, rest % heads, tile * TILE + tl.arange(0, TILE)


@triton.jit
def load(at, tokens, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """[tokens, WIDTH]; zeros beyond the problem."""
    where = at + tokens[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(where, mask=(tokens < SIZE)[:, None], other=0.0)


@triton.jit
def store(at, tokens, stride, values, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    where = at + tokens[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    tl.store(where, values.to(at.dtype.element_ty), mask=(tokens < SIZE)[:, None])


@triton.jit
def load_packed(at, tokens, channels, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Queries, keys and values of the same tokens, from where a problem's and head's queries begin."""
    q = load(at, tokens, 3 * channels, SIZE, WIDTH)
    k = load(at + channels, tokens, 3 * channels, SIZE, WIDTH)
    v = load(at + 2 * channels, tokens, 3 * channels, SIZE, WIDTH)
    return q, k, v


@triton.jit
def store_sum(SUMS, number, queries, keys, values, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Into matrix `number` of [.., size, size]."""
    at = SUMS + tl.cast(number, tl.int64) * SIZE * SIZE + queries[:, None] * SIZE + keys[None, :]
    tl.store(at, values, mask=(queries < SIZE)[:, None] & (keys < SIZE)[None, :])


@triton.jit
def load_bias(BIAS, queries, keys, problem_head, SIZE: tl.constexpr, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32: -inf for keys beyond the problem, 0 for queries beyond it, which are never stored.

    Args:
        queries, keys: tokens that broadcast against each other.
        WINDOW: side of the window that the bias is a table for; 0 for a dense bias.
    """
    if WINDOW == 0:
        at = problem_head * SIZE * SIZE + queries * SIZE + keys
    else:  # codes of two positions differ by the distance of their pair's entry from the middle of the table
        side: tl.constexpr = 2 * WINDOW - 1
        codes = (queries // WINDOW - keys // WINDOW) * side + queries % WINDOW - keys % WINDOW
        at = problem_head * side * side + side * side // 2 + codes
    bias = tl.load(BIAS + at, mask=(queries < SIZE) & (keys < SIZE), other=0.0)
    return tl.where(keys < SIZE, bias, float("-inf"))


@triton.jit
def load_members(MEMBERS, item, period, tokens, SIZE: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Those of a sample's tokens; something where no group is kept apart."""
    # Not two returns: Triton would compile both, and refuse their two types.
    return tl.load(MEMBERS + (item % period) * SIZE + tokens, mask=tokens < SIZE, other=0) if MASKED else tokens


@triton.jit
def hide(logits, queries, query_members, key_members, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """-inf for pairs of two groups. Queries beyond the problem see all keys: NaNs of theirs would spread.

    Args:
        queries, query_members, key_members: broadcast against each other.
    """
    return tl.where((query_members == key_members) | (queries >= SIZE), logits, float("-inf"))
