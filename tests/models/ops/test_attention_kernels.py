"""The attention kernels without a GPU: what they compute, by Triton's interpreter, and what they take of one, by its
compiler, which needs none."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mixmae.models.layers.token_order import relative_position_index
from mixmae.models.layers.window_attention import position_bias
from mixmae.models.ops import attention_kernels
from mixmae.models.ops.window_attention import table_gradient
from tests.helpers import ROOT
from tests.models.ops import triton_cases

A100_SHARED = 163 * 1024
"""Bytes of shared memory for a program; more is refused only when a kernel starts."""

WIDE_PRODUCTS = 3
"""In a kernel, of 64 bits, at least; where only the bias' gradient is stored by them there are 2."""


class Case(NamedTuple):
    """Problems, heads, tokens of each, side of their window or 0, whether groups are kept apart by members."""

    num: int
    heads: int
    size: int
    window: int = 0
    masked: bool = False


CASES = {
    "windows of 14, mixed": Case(1, 11, 196, 14, masked=True),
    "windows of 14": Case(1, 11, 196, 14),
    "stage 3, K = 2": Case(1, 44, 100),
    "windows of 7, mixed": Case(1, 4, 49, 7, masked=True),
    "stage 3, K = 4": Case(3, 44, 48),
    "stage 4, K = 2": Case(1, 88, 25),
    "windows of 7": pytest.param(Case(1, 4, 49, 7), marks=pytest.mark.slow),
    "windows of 16, mixed": pytest.param(Case(1, 4, 256, 16, masked=True), marks=pytest.mark.slow),
    "groups of 128": pytest.param(Case(2, 16, 128), marks=pytest.mark.slow),
}
SPILLED = {CASES["windows of 7, mixed"]: 136} if triton.__version__.startswith("3.6.") else {Case(1, 4, 49, 7): 16}
"""Bytes in the backward pass on an A100, where not 0; Triton 3.6 is that of torch 2.11."""


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


def launched(case: Case, dtype: torch.dtype, architecture: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Kernels by name, compiled as they are launched on a GPU that a stand-in of Triton's driver tells of.

    Not by a signature of the test's own: Triton compiles for the types that it is given, and numbers that are 1 into
    the kernel.
    """
    device = f"sm_{architecture}"  # kernels are kept by device
    shown = {"current_device": device, "current_stream": 0, "current_target": GPUTarget("cuda", architecture, 32)}
    stand_in = {f"get_{name}": lambda *_, value=value: value for name, value in shown.items()}
    run, kernels = JITFunction.run, {}

    def compile_only(self: Any, *args: Any, warmup: bool, **more: Any) -> None:
        kernels[self.fn.__name__] = run(self, *args, warmup=True, **more)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    num, heads, size, window, masked = case
    qkv = meta(64, num * size, 3 * heads * 32)
    bias = meta(heads, (2 * window - 1) ** 2) if window else meta(num, heads, size, size)
    members = meta(16, size, dtype=torch.int32) if masked else None
    before = dict(vars(driver))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    driver.set_active(SimpleNamespace(**stand_in))
    try:
        out, log_sums = attention_kernels.forward(qkv, bias, num, 1.0, window, members)
        attention_kernels.backward(out, qkv, bias, out, log_sums, num, 1.0, window, members)
    finally:
        vars(driver).update(before)
    return kernels


def registers(kernel: Any, folder: Path) -> tuple[int, int]:
    """Of a thread, and bytes of those that were spilled."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run([program, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])


def assert_fits(kernels: dict[str, Any], folder: Path, spilled: int = 0) -> None:
    for name, kernel in kernels.items():
        used, found = registers(kernel, folder)
        print(f"{name}: {used} registers, {found} bytes spilled, {kernel.metadata.shared} bytes shared")
        assert used <= 255
        assert found <= spilled
        assert 0 < kernel.metadata.shared <= A100_SHARED
        # Of where a sample begins: 256 images of 448 px are more elements in Swin-H's first stage than 32 bits count.
        assert len(re.findall(r"arith\.muli .* : i64", kernel.asm["ttir"])) >= WIDE_PRODUCTS


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_a100_holds_the_kernels(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = launched(case, torch.bfloat16, 80, monkeypatch)
    assert len(kernels) == (4 if case.size > 64 else 2)
    assert_fits(kernels, tmp_path, SPILLED.get(case, 0))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_h100_holds_the_kernels_without_spills(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_fits(launched(case, torch.bfloat16, 90, monkeypatch), tmp_path)


def test_the_largest_problem_in_fp32_fits_an_a100(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in launched(Case(2, 4, 64), torch.float32, 80, monkeypatch).values():
        assert 0 < kernel.metadata.shared <= A100_SHARED


@given(window=st.integers(1, 8), heads=st.integers(1, 3))
def test_the_tables_gradient_is_that_of_the_lookup(window: int, heads: int) -> None:
    torch.manual_seed(window)
    table = torch.zeros((2 * window - 1) ** 2, heads, dtype=torch.float64, requires_grad=True)
    bias = position_bias(table, relative_position_index(window), window**2)[0]
    grad = torch.randn_like(bias)
    torch.testing.assert_close(table_gradient(grad), torch.autograd.grad(bias, table, grad)[0])
