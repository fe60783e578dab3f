"""What a node's exporter finds out by itself."""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest

from monitoring.metrics import BY_NAME
from monitoring.node import Gpus, Reading, readings
from tests.monitoring.drivers import pynvml


def test_gpus_are_told_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    told = [*Gpus().readings()]
    assert told == [
        Reading("gpu_utilization_ratio", ("0",), 0.87),
        Reading("gpu_power_watts", ("0",), 612.5),
        Reading("gpu_temperature_celsius", ("0",), 64.0),
        Reading("gpu_utilization_ratio", ("1",), 0.0),
        Reading("gpu_temperature_celsius", ("1",), 31.0),
    ]
    assert {reading.metric for reading in told} == {name for name in BY_NAME if name.startswith("gpu_")}


def test_a_node_without_the_library_tells_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert [*Gpus().readings()] == []


def test_a_node_without_a_driver_tells_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    monkeypatch.setattr(pynvml, "nvmlInit", mock.Mock(side_effect=pynvml.NVMLError))
    assert [*Gpus().readings()] == []


def test_memory_and_disk_are_told_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = SimpleNamespace(total=6 * 10**12, free=2 * 10**12)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * 2**30, total=8 * 2**30))
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk)
    monkeypatch.setattr("monitoring.node.SHARED_MEMORY", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    gpus = Gpus()
    assert [*readings(tmp_path, gpus)] == [
        Reading("node_memory_available_bytes", (), 3 * 2**30),
        Reading("node_memory_total_bytes", (), 8 * 2**30),
        Reading("run_dir_free_bytes", (), 2 * 10**12),
        Reading("run_dir_size_bytes", (), 6 * 10**12),
        Reading("shm_free_bytes", (), 2 * 10**12),
        *gpus.readings(),
    ]
