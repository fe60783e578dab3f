"""`python -m tests.models.ops.triton_cases DEVICE [quick]`: the kernels beside the formula, in fp32 and bf16.

A process of its own, because Triton's interpreter (TRITON_INTERPRET=1), which runs kernels on a CPU, is chosen once.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixmae.models.layers.token_order import relative_position_index
from mixmae.models.layers.window_attention import MAX_SIZES, MAX_WINDOWS, position_bias
from mixmae.models.ops.grouped_attention import grouped_attention
from mixmae.models.ops.sdpa import explicit
from mixmae.models.ops.window_attention import window_attention

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Errors of results and gradients, relative to their norm."""
GROUPED = [(3, 1, 48, 2, 32), (1, 1, 100, 1, 32), (1, 2, 12, 3, 16), (2, 2, 100, 2, 32), (4, 3, 16, 5, 32)]
"""num, heads, size, batch, width; the first two are quick in the interpreter."""
WINDOWS = [
    (7, 1, 2, 1, "shared"),
    (14, 1, 1, 1, "own"),
    (2, 1, 1, 2, "none"),
    (7, 2, 2, 2, "own"),
    (12, 1, 1, 1, "none"),
    (14, 2, 1, 2, "own"),
    (16, 1, 1, 1, "shared"),
]
"""Side, heads, windows, batch, whose map of groups; the first two are quick."""
Attention = Callable[..., Tensor]


def main(device: str, quick: bool) -> None:
    if device == "cpu":
        multiply_bf16_in_interpreter()
        count_by_tensors_in_interpreter()
    compile_them(device)
    number = 2 if quick else None
    for dtype, bound in BOUNDS.items():
        for case in GROUPED[: 1 if quick and dtype != torch.float32 else number]:
            if device == "cpu" or case[2] <= MAX_SIZES[dtype.itemsize]:
                compare(case, grouped_attention, grouped_formula, grouped_inputs(*case, dtype, device), bound)
        for window in WINDOWS[: 1 if quick and dtype != torch.float32 else number]:
            if device == "cpu" or window[0] <= MAX_WINDOWS[dtype.itemsize]:
                compare(window, window_attention, window_formula, window_inputs(*window, dtype, device), bound)


def compare(case: Any, kernel: Attention, formula: Attention, inputs: Sequence[Any], bound: float) -> None:
    """Equal to the formula; bit for bit the same once more."""
    whole, start, end, bias, *more = inputs
    torch.manual_seed(1)
    weights = torch.randn(len(whole), end - start, whole.shape[2] // 3, device=whole.device)
    results = []
    for attend in (kernel, kernel, formula):
        given = [whole.clone().requires_grad_(), bias.clone().requires_grad_()]
        out = attend(given[0][:, start:end], given[1], *more)
        results.append((out, *torch.autograd.grad((out.float() * weights).sum(), given)))
    for first, second, expected in zip(*results, strict=True):
        assert torch.equal(first, second), case
        error = (first.float() - expected.float()).norm() / expected.float().norm()
        assert error < bound, (whole.dtype, case, float(error))


def compile_them(device: str) -> None:
    """What torch.compile is told of shapes, and of gradients, is so; no graph breaks."""
    for kernel, (whole, start, end, *more) in (
        (grouped_attention, grouped_inputs(1, 1, 12, 2, 16, torch.float32, device)),
        (window_attention, window_inputs(2, 1, 1, 2, "own", torch.float32, device)),
    ):
        results = []
        for attend in (kernel, torch.compile(kernel, backend="aot_eager", fullgraph=True)):
            given = [whole.clone().requires_grad_(), more[0].clone().requires_grad_()]
            out = attend(given[0][:, start:end], given[1], *more[1:])
            results.append((out, *torch.autograd.grad(out.square().sum(), given)))
        for eager, compiled in zip(*results, strict=True):
            assert torch.equal(eager, compiled)


def grouped_inputs(num: int, heads: int, size: int, batch: int, width: int, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    tokens, channels = num * size, heads * width
    # Part of a longer sequence, as attention gets it.
    whole = torch.randn(batch, tokens + 7, 3 * channels, device=device).to(dtype)
    bias = torch.randn(num, heads, size, size, device=device).to(dtype)
    return whole, 5, 5 + tokens, bias, width**-0.5


def window_inputs(side: int, heads: int, num: int, batch: int, groups: str, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    whole = torch.randn(batch, num * side**2, 3 * heads * 32, device=device).to(dtype)
    table = torch.randn((2 * side - 1) ** 2, heads, device=device).to(dtype)
    maps = {"none": 0, "shared": 1, "own": batch}[groups]
    # Group 0, which stands for tokens beyond a problem, is in none; a sample's own groups lie apart, as cells do, so
    # that the first keys of a problem are hidden from the others.
    members = torch.randint(1, 4, (maps, num, side**2), device=device, dtype=torch.int32) if maps else None
    if members is not None and groups == "own":
        members = members.sort().values
    return whole, 0, num * side**2, table, members, 32**-0.5


def grouped_formula(qkv: Tensor, bias: Tensor, scale: float) -> Tensor:
    """In fp32, whatever the operands."""
    num, heads, size, _ = bias.shape
    q, k, v = qkv.float().view(len(qkv), num, size, 3, heads, -1).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
    out = explicit(q, k, v, bias.float().flatten(0, 1)[None], scale)
    return out.view(len(qkv), num, heads, size, -1).transpose(2, 3).reshape(len(qkv), num * size, -1).to(qkv.dtype)


def window_formula(qkv: Tensor, table: Tensor, members: Tensor | None, scale: float) -> Tensor:
    """In fp32, whatever the operands, with a dense bias and mask."""
    side = (round(len(table) ** 0.5) + 1) // 2
    pairs = relative_position_index(side).to(qkv.device)
    bias = position_bias(table.float(), pairs, side**2)
    packed = qkv.float().unflatten(1, (-1, side**2)).unflatten(3, (3, table.shape[1], -1))
    q, k, v = packed.permute(3, 0, 1, 4, 2, 5)
    if members is not None:
        hidden = members[..., :, None] != members[..., None, :]
        bias = torch.where(hidden[:, :, None], float("-inf"), bias)
    return explicit(q, k, v, bias, scale).transpose(2, 3).reshape(*qkv.shape[:2], -1).to(qkv.dtype)


def multiply_bf16_in_interpreter() -> None:
    """Triton's interpreter holds bf16 as integers, and multiplies them as such: here as the numbers they stand for."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        wide = [self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return original(self, *wide, *more)

    interpreter.InterpreterBuilder.create_dot = create_dot


def count_by_tensors_in_interpreter() -> None:
    """Triton 3.6's interpreter takes loops' bounds from arrays of one element, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if __name__ == "__main__":
    main(sys.argv[1], quick="quick" in sys.argv)
