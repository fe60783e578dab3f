import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys

import torch

from trainer.malloc import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):  # the first is new to the process either way
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another malloc")
def test_freed_memory_is_not_fetched_from_the_system_again() -> None:
    faults = {
        way: int(subprocess.run([sys.executable, "-c", FAULTS, way], check=True, capture_output=True, text=True).stdout)
        for way in ("given back", "kept")
    }
    assert faults["kept"] < faults["given back"] / 10
