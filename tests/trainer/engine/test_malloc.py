import os
import platform
from pathlib import Path

import pytest

from tests.warm import WarmProcess

FAULTS = """
import resource
import sys

import torch
from torch import nn

from mixmae.trainer.engine.malloc import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
net = nn.Sequential(*(nn.GELU() for _ in range(12)))
x = torch.ones(2048, 1024, requires_grad=True)
faults = []
for step in range(41):
    if step % 10 == 0:
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    net(x).sum().backward()
    x.grad = None
# The first ones' memory is new to the process either way, and a machine short of memory takes some of it back.
print(min(later - earlier for earlier, later in zip(faults[1:], faults[2:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another malloc")
def test_a_step_finds_the_memory_of_the_last_one(tmp_path: Path) -> None:
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)

    def faults(way: str) -> int:
        out, err = WarmProcess(str(script), way, env=os.environ).communicate()
        assert out, err
        return int(out)

    assert faults("kept") < faults("given back") / 4
