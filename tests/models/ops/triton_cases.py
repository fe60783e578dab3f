"""`python -m tests.models.ops.triton_cases DEVICE`: the kernel beside the formula, in fp32 and a half precision.

A process of its own, because Triton's interpreter (TRITON_INTERPRET=1), which runs kernels on a CPU, is chosen once.
"""

import sys

import torch
from torch import Tensor

from mixmae.models.layers.window_attention import MAX_SIZES
from mixmae.models.ops.grouped_attention import grouped_attention
from mixmae.models.ops.sdpa import explicit

CASES = [(1, 2, 12, 3, 16), (3, 1, 48, 2, 32), (2, 2, 100, 1, 32), (4, 3, 16, 5, 32)]
"""num, heads, size, batch, width."""


def main(device: str) -> None:
    # The interpreter holds bf16 as integers, and multiplies them as such.
    half = torch.bfloat16 if device == "cuda" else torch.float16
    for dtype, off in ((torch.float32, 1e-5), (half, 2e-2)):
        for num, heads, size, batch, width in CASES:
            if size > MAX_SIZES[dtype.itemsize]:
                continue
            torch.manual_seed(0)
            tokens, channels = num * size, heads * width
            # Part of a longer sequence, as attention gets it.
            whole = torch.randn(batch, tokens + 7, 3 * channels, device=device).to(dtype)
            bias = torch.randn(num, heads, size, size, device=device).to(dtype)
            weights = torch.randn(batch, tokens, channels, device=device)
            results = []
            for attend in (grouped_attention, by_formula):
                given = [whole.clone().requires_grad_(), bias.clone().requires_grad_()]
                out = attend(given[0][:, 5 : 5 + tokens], given[1], width**-0.5)
                results.append((out, *torch.autograd.grad((out.float() * weights).sum(), given)))
            for actual, expected in zip(*results, strict=True):
                error = (actual.float() - expected.float()).norm() / expected.float().norm()
                assert error < off, (dtype, num, heads, size, batch, width, float(error))


def by_formula(qkv: Tensor, bias: Tensor, scale: float) -> Tensor:
    """In fp32, whatever the operands."""
    num, heads, size, _ = bias.shape
    q, k, v = qkv.float().view(len(qkv), num, size, 3, heads, -1).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
    out = explicit(q, k, v, bias.float().flatten(0, 1)[None], scale)
    return out.view(len(qkv), num, heads, size, -1).transpose(2, 3).reshape(len(qkv), num * size, -1).to(qkv.dtype)


if __name__ == "__main__":
    main(sys.argv[1])
