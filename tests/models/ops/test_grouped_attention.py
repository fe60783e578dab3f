import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_the_largest_problem_fits_a_gpu(
    kernel: str, dtype: str, itemsize: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for an A100, which needs none: shared memory beyond its 163 KiB is refused only when a kernel starts."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, size = getattr(grouped_attention, kernel), MAX_SIZES[itemsize]
    constants = {"SIZE": size, "WIDTH": 32, "BLOCK": size, "CHUNK": 4}
    types = {"GRAD_BIAS": "*fp32", "scale": "fp32", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, f"*{dtype}" if name.isupper() else "i32") for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    options = {"num_warps": grouped_attention.warps(size)}
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert 0 < compiled.metadata.shared <= 163 * 1024


@pytest.mark.gpu
def test_the_kernel_equals_the_formula() -> None:
    triton_cases.main("cuda")
