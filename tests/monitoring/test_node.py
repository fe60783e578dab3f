"""What a node's exporter finds out by itself."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from monitoring.metrics import BY_NAME
from monitoring.node import Gpus, Reading, readings


class FakeNvml(ModuleType):
    """NVML of a node with two GPUs: percent, milliwatts and degrees, of which the second tells no power."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, has_driver: bool = True) -> None:
        super().__init__("pynvml")
        self.has_driver = has_driver

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.has_driver:
            raise self.NVMLError

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        return number

    def nvmlDeviceGetUtilizationRates(self, device: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=[87, 0][device], memory=41)

    def nvmlDeviceGetPowerUsage(self, device: int) -> int:  # noqa: N802
        if device == 1:
            raise self.NVMLError
        return 612_500

    def nvmlDeviceGetTemperature(self, device: int, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return [64, 31][device]


def test_gpus_are_told_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    told = [*Gpus().readings()]
    assert told == [
        Reading("gpu_utilization_ratio", ("0",), 0.87),
        Reading("gpu_power_watts", ("0",), 612.5),
        Reading("gpu_temperature_celsius", ("0",), 64.0),
        Reading("gpu_utilization_ratio", ("1",), 0.0),
        Reading("gpu_temperature_celsius", ("1",), 31.0),
    ]
    assert {reading.metric for reading in told} == {name for name in BY_NAME if name.startswith("gpu_")}


@pytest.mark.parametrize("module", [None, FakeNvml(has_driver=False)], ids=["no library", "no driver"])
def test_a_node_without_gpus_tells_none(monkeypatch: pytest.MonkeyPatch, module: ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert [*Gpus().readings()] == []


def test_memory_and_disk_are_told_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = SimpleNamespace(total=6 * 10**12, free=2 * 10**12)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * 2**30, total=8 * 2**30))
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk)
    monkeypatch.setattr("monitoring.node.SHARED_MEMORY", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    gpus = Gpus()
    assert [*readings(tmp_path, gpus)] == [
        Reading("node_memory_available_bytes", (), 3 * 2**30),
        Reading("node_memory_total_bytes", (), 8 * 2**30),
        Reading("run_dir_free_bytes", (), 2 * 10**12),
        Reading("run_dir_size_bytes", (), 6 * 10**12),
        Reading("shm_free_bytes", (), 2 * 10**12),
        *gpus.readings(),
    ]
