import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import triton_cases

ROOT = Path(__file__).parents[2]


def test_the_kernel_equals_the_formula_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.models.triton_cases", "cpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
def test_the_kernel_equals_the_formula() -> None:
    triton_cases.main("cuda")
