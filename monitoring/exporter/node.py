"""A node's own metrics: memory, disk, GPUs. What does not answer is left out of a scrape."""

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

SHARED_MEMORY = Path("/dev/shm")
PATIENCE = 1.0
"""Seconds that a scrape waits for the storage of the run directory."""


class Reading(NamedTuple):
    metric: str
    labels: tuple[str, ...]
    value: float


class Gpus:
    """The node's GPUs through NVML; none where its library or a driver is missing."""

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            import pynvml
        except ModuleNotFoundError:
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return
        self._nvml = pynvml
        self._queries = {
            "gpu_utilization_ratio": self._utilization,
            "gpu_power_watts": self._power,
            "gpu_temperature_celsius": self._temperature,
        }

    def readings(self) -> Iterator[Reading]:
        for number in range(self._count()):
            for name, query in self._queries.items():
                # Not every GPU, and no MIG instance, has everything; one that is lost has nothing.
                with suppress(self._nvml.NVMLError):
                    yield Reading(name, (str(number),), query(self._nvml.nvmlDeviceGetHandleByIndex(number)))

    def _count(self) -> int:
        if self._nvml is None:
            return 0
        try:
            return int(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError:  # the driver is gone
            return 0

    def _utilization(self, device: Any) -> float:
        return float(self._nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100)

    def _power(self, device: Any) -> float:
        return float(self._nvml.nvmlDeviceGetPowerUsage(device) / 1000)

    def _temperature(self, device: Any) -> float:
        return float(self._nvml.nvmlDeviceGetTemperature(device, self._nvml.NVML_TEMPERATURE_GPU))


class Disk:
    """The file system of a folder, asked by a thread: storage that hangs must not hold up the ranks' metrics."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._one_asks = threading.Lock()
        self._answer: Future[tuple[int, int]] | None = None
        """Bytes in all and free."""

    def readings(self) -> Iterator[Reading]:
        with self._one_asks:
            if self._answer is None or self._answer.done():
                self._answer = Future()
                threading.Thread(target=self._ask, args=(self._answer,), daemon=True).start()
            answer = self._answer
        with suppress(OSError):  # it is gone, or hangs: TimeoutError is one
            total, free = answer.result(PATIENCE)
            yield Reading("run_dir_free_bytes", (), free)
            yield Reading("run_dir_size_bytes", (), total)

    def _ask(self, answer: "Future[tuple[int, int]]") -> None:
        try:
            usage = shutil.disk_usage(self._folder)
            answer.set_result((usage.total, usage.free))
        except OSError as error:
            answer.set_exception(error)


def readings(disk: Disk, gpus: Gpus) -> Iterator[Reading]:
    """Everything about this node, now."""
    memory = psutil.virtual_memory()
    yield Reading("node_memory_available_bytes", (), memory.available)
    yield Reading("node_memory_total_bytes", (), memory.total)
    yield from disk.readings()
    if SHARED_MEMORY.is_dir():
        yield Reading("shm_free_bytes", (), shutil.disk_usage(SHARED_MEMORY).free)
    yield from gpus.readings()
