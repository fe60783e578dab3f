import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys

import torch
from torch import nn

from mixmae.trainer.engine.malloc import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
torch.manual_seed(0)
net = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.GELU())))
x = torch.randn(2048, 1024)
for step in range(40):
    if step == 20:  # the first ones' memory is new to the process either way
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    net(x).square().sum().backward()
    net.zero_grad()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another malloc")
def test_a_step_finds_the_memory_of_the_last_one() -> None:
    def faults(way: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, way], check=True, capture_output=True).stdout)

    assert faults("kept") < faults("given back") / 10
