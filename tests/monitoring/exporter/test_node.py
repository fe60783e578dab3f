"""What a node's exporter finds out by itself."""

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest

from mixmae.monitoring.exporter.node import Disk, Gpus, Reading, readings
from mixmae.monitoring.metrics import BY_NAME
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


def test_a_gpu_that_is_lost_silences_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(number: int) -> int:
        if number == 0:
            raise pynvml.NVMLError
        return number

    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    gpus = Gpus()
    assert {reading.labels for reading in gpus.readings()} == {("1",)}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", mock.Mock(side_effect=pynvml.NVMLError))
    assert [*gpus.readings()] == []


def test_storage_that_hangs_or_is_gone_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers, asked = threading.Event(), []

    def hangs(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        assert answers.wait(60)
        return SimpleNamespace(total=6, free=2)

    monkeypatch.setattr("mixmae.monitoring.exporter.node.PATIENCE", 0.1)
    disk = Disk(tmp_path / "none")
    assert [*disk.readings()] == []
    monkeypatch.setattr("shutil.disk_usage", hangs)
    for _ in range(3):
        assert [*disk.readings()] == []
    assert len(asked) == 1  # not a thread for every scrape
    answers.set()
    monkeypatch.setattr("mixmae.monitoring.exporter.node.PATIENCE", 60)
    assert {reading.metric for reading in disk.readings()} == {"run_dir_free_bytes", "run_dir_size_bytes"}


def test_memory_and_disk_are_told_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = SimpleNamespace(total=6 * 10**12, free=2 * 10**12)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * 2**30, total=8 * 2**30))
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk)
    monkeypatch.setattr("mixmae.monitoring.exporter.node.SHARED_MEMORY", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    gpus = Gpus()
    assert [*readings(Disk(tmp_path), gpus)] == [
        Reading("node_memory_available_bytes", (), 3 * 2**30),
        Reading("node_memory_total_bytes", (), 8 * 2**30),
        Reading("run_dir_free_bytes", (), 2 * 10**12),
        Reading("run_dir_size_bytes", (), 6 * 10**12),
        Reading("shm_free_bytes", (), 2 * 10**12),
        *gpus.readings(),
    ]
