import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mixmae.models.layers.window_attention import MAX_SIZES
from mixmae.models.ops import grouped_attention
from tests.helpers import ROOT
from tests.models.ops import triton_cases


def test_the_kernel_equals_the_formula_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.models.ops.triton_cases", "cpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def compiled(kernel: str, size: int, dtype: str, architecture: int) -> Any:
    """For a GPU, which it needs none for; pointers are aligned as torch's are."""
    function, block = getattr(grouped_attention, kernel), max(16, triton.next_power_of_2(size))
    constants = {"SIZE": size, "WIDTH": 32, "BLOCK": block, "CHUNK": 4}
    types = {"GRAD_BIAS": "*fp32", "scale": "fp32", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, f"*{dtype}" if name.isupper() else "i32") for name in function.arg_names}
    pointers = [number for number, name in enumerate(function.arg_names) if signature[name].startswith("*")]
    aligned = {(number,): [["tt.divisibility", 16]] for number in pointers}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": grouped_attention.warps(block)}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_the_largest_problem_fits_a_gpu(
    kernel: str, dtype: str, itemsize: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared memory beyond an A100's 163 KiB is refused only when a kernel starts."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert 0 < compiled(kernel, MAX_SIZES[itemsize], dtype, 80).metadata.shared <= 163 * 1024


@pytest.mark.parametrize(("size", "architecture"), [(25, 80), (25, 90)])
def test_groups_of_four_images_spill_no_registers(
    size: int, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass of K = 4, on an A100 and an H100; that of K = 2 spills (docs/performance.md)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    file = tmp_path / "kernel.cubin"
    file.write_bytes(compiled("_backward", size, "bf16", architecture).asm["cubin"])
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run([program, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    assert (int(found[1]) <= 255, int(found[2])) == (True, 0)


@pytest.mark.gpu
def test_the_kernel_equals_the_formula() -> None:
    triton_cases.main("cuda")
