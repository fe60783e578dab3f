"""What a node's exporter finds out by itself: memory, disk, GPUs."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

SHARED_MEMORY = Path("/dev/shm")


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
        if self._nvml is None:
            return
        for number in range(self._nvml.nvmlDeviceGetCount()):
            device = self._nvml.nvmlDeviceGetHandleByIndex(number)
            for name, query in self._queries.items():
                try:
                    yield Reading(name, (str(number),), query(device))
                except self._nvml.NVMLError:
                    continue  # not every GPU, and no part of a divided one, tells everything

    def _utilization(self, device: Any) -> float:
        return float(self._nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100)

    def _power(self, device: Any) -> float:
        return float(self._nvml.nvmlDeviceGetPowerUsage(device) / 1000)

    def _temperature(self, device: Any) -> float:
        return float(self._nvml.nvmlDeviceGetTemperature(device, self._nvml.NVML_TEMPERATURE_GPU))


def readings(run_dir: Path, gpus: Gpus) -> Iterator[Reading]:
    """Everything about this node, now."""
    memory = psutil.virtual_memory()
    yield Reading("node_memory_available_bytes", (), memory.available)
    yield Reading("node_memory_total_bytes", (), memory.total)
    disk = shutil.disk_usage(run_dir)
    yield Reading("run_dir_free_bytes", (), disk.free)
    yield Reading("run_dir_size_bytes", (), disk.total)
    if SHARED_MEMORY.is_dir():
        yield Reading("shm_free_bytes", (), shutil.disk_usage(SHARED_MEMORY).free)
    yield from gpus.readings()
