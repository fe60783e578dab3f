import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixmae.trainer.engine.affinity import bind_to_gpu, cores_of

GPU = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x8B, pci_device_id=0)


def test_lists_of_cores_are_the_kernels() -> None:
    assert cores_of("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}


@pytest.mark.parametrize(
    ("own", "node", "expected"),
    [
        (set(range(16)), "1", {8, 9, 10, 11}),
        ({2, 3, 10}, "1", {10}),  # what Slurm gave
        ({0, 1}, "1", {0, 1}),  # all of the other socket: better than none
        (set(range(16)), "-1", set(range(16))),  # a machine of one node, or a virtual one
        (set(range(16)), None, set(range(16))),
    ],
)
def test_a_rank_keeps_to_its_gpus_node(
    own: set[int], node: str | None, expected: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text("8-11\n")
    if node is not None:
        (tmp_path / "0000:8b:00.0").mkdir()
        (tmp_path / "0000:8b:00.0" / "numa_node").write_text(f"{node}\n")
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: own)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: bound.append(cores))
    assert bind_to_gpu(GPU, tmp_path, tmp_path) == expected
    assert bound == ([expected] if expected != own else [])
