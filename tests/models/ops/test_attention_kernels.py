"""The attention kernels without a GPU: what they compute, by Triton's interpreter, and what they take of one, by its
compiler, which needs none."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mixmae.models.layers.token_order import relative_position_index
from mixmae.models.layers.window_attention import position_bias
from mixmae.models.ops import attention_kernels, attention_tiled, attention_whole
from mixmae.models.ops.window_attention import table_gradient
from tests.helpers import ROOT
from tests.models.ops import triton_cases

A100_SHARED = 163 * 1024
"""Bytes of shared memory for a program; more is refused only when a kernel starts."""
TILED = ("forward_kernel", "backward_queries_kernel", "backward_keys_kernel", "backward_bias_kernel")
WHOLE = ("forward_kernel", "backward_kernel")
CASES = [
    *((kernel, 196, 14) for kernel in TILED),  # windows of 14
    *((kernel, 100, 0) for kernel in TILED),  # stage 3 with K = 2 groups
    *((kernel, 49, 7) for kernel in WHOLE),  # windows of 7
    ("backward_kernel", 52, 0),  # stage 3 with K = 4
    ("backward_kernel", 25, 0),  # stage 4 with K = 2
]
"""Kernel, tokens of a problem, side of its window or 0."""
SPILLED_BY_TRITON_3_6 = {("backward_kernel", 49): 64}
"""Bytes on an A100, where not 0, by the Triton of torch 2.11; 3.9 spills none."""


@pytest.mark.parametrize("cases", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_kernels_equal_the_formula_under_the_interpreter(cases: str) -> None:
    command = [sys.executable, "-m", "tests.models.ops.triton_cases", "cpu", cases]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
def test_kernels_equal_the_formula() -> None:
    triton_cases.main("cuda", quick=False)


@pytest.fixture(autouse=True, scope="module")
def no_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(kernel: str, size: int, window: int, dtype: str, architecture: int) -> Any:
    """With masks for groups, where there is a window; pointers are aligned as torch's are."""
    tile, step, warps = attention_kernels.tiling(size)
    function = getattr(attention_tiled if size > tile else attention_whole, kernel)
    every = {"SIZE": size, "WIDTH": 32, "TILE": tile, "STEP": step, "WINDOW": window, "MASKED": window > 0}
    constants = {name: value for name, value in every.items() if name in function.arg_names}
    types = {**dict.fromkeys(("GRAD_BIAS", "LOG_SUMS", "INNERS"), "*fp32"), "MEMBERS": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, f"*{dtype}" if name.isupper() else "i32") for name in function.arg_names}
    names = list(enumerate(function.arg_names))
    aligned = {(number,): [["tt.divisibility", 16]] for number, name in names if signature[name][0] == "*"}
    aligned[(function.arg_names.index("stride"),)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def registers(kernel: Any, folder: Path) -> tuple[int, int]:
    """Of a thread, and bytes of those that were spilled."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run([program, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])


def assert_fits(kernel: Any, folder: Path, spilled: int = 0) -> None:
    used, found = registers(kernel, folder)
    print(f"{used} registers, {found} bytes spilled, {kernel.metadata.shared} bytes shared")
    assert used <= 255
    assert found <= spilled
    assert 0 < kernel.metadata.shared <= A100_SHARED


@pytest.mark.parametrize(("kernel", "size", "window"), CASES)
def test_an_a100_holds_the_kernels(kernel: str, size: int, window: int, tmp_path: Path) -> None:
    spilled = SPILLED_BY_TRITON_3_6.get((kernel, size), 0) if triton.__version__.startswith("3.6.") else 0
    assert_fits(compiled(kernel, size, window, "bf16", 80), tmp_path, spilled)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "size", "window"), CASES)
def test_an_h100_holds_the_kernels_without_spills(kernel: str, size: int, window: int, tmp_path: Path) -> None:
    assert_fits(compiled(kernel, size, window, "bf16", 90), tmp_path)


@pytest.mark.parametrize("kernel", WHOLE)
def test_the_largest_problem_in_fp32_fits_an_a100(kernel: str) -> None:
    assert 0 < compiled(kernel, 64, 0, "fp32", 80).metadata.shared <= A100_SHARED


@given(window=st.integers(1, 8), heads=st.integers(1, 3))
def test_the_tables_gradient_is_that_of_the_lookup(window: int, heads: int) -> None:
    torch.manual_seed(window)
    table = torch.zeros((2 * window - 1) ** 2, heads, dtype=torch.float64, requires_grad=True)
    bias = position_bias(table, relative_position_index(window), window**2)[0]
    grad = torch.randn_like(bias)
    torch.testing.assert_close(table_gradient(grad), torch.autograd.grad(bias, table, grad)[0])
