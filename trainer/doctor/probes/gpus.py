"""A host's GPUs through NVML; nvidia-ml-py is optional, and a machine may have no driver."""

from collections.abc import Callable
from typing import Any

from mixmae.trainer.doctor.facts import Gpu

_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""Bytes per second of a PCIe lane, by generation."""


def read_gpus() -> tuple[tuple[Gpu, ...], dict[str, str], str]:
    """The GPUs, driver versions, and why NVML is unavailable (empty if it is available)."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return (), {}, "the package nvidia-ml-py is missing"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), {}, f"NVML does not start: {error}"
    try:
        count = pynvml.nvmlDeviceGetCount()
        gpus = tuple(_Reader(pynvml, index).gpu() for index in range(count))
        return gpus, {"NVIDIA driver": pynvml.nvmlSystemGetDriverVersion()}, ""
    finally:
        pynvml.nvmlShutdown()


class _Reader:
    """Reads one GPU. Values that a GPU does not support are None."""

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml, self._index = nvml, index
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def gpu(self) -> Gpu:
        nvml, handle = self._nvml, self._handle
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        link, kind = self._link()
        return Gpu(
            index=self._index,
            uuid=nvml.nvmlDeviceGetUUID(handle),
            name=nvml.nvmlDeviceGetName(handle),
            memory=memory.total,
            free=memory.free,
            used_by=tuple(self._get(lambda: [p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]) or ()),
            ecc_uncorrected=self._get(self._uncorrected),
            pending_repair=self._get(lambda: bool(nvml.nvmlDeviceGetRemappedRows(handle)[2])),
            throttled=self._throttled(),
            clock_limit_mhz=self._get(lambda: int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))),
            pcie_width=self._get(self._pcie_width),
            link=link,
            link_kind=kind,
        )

    def _get(self, query: Callable[[], Any]) -> Any:
        try:
            return query()
        except self._nvml.NVMLError:
            return None

    def _uncorrected(self) -> int:
        nvml = self._nvml
        kinds = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        return int(nvml.nvmlDeviceGetTotalEccErrors(self._handle, *kinds))

    def _throttled(self) -> tuple[str, ...]:
        nvml = self._nvml
        reasons = {
            nvml.nvmlClocksThrottleReasonHwThermalSlowdown: "hardware thermal slowdown",
            nvml.nvmlClocksThrottleReasonSwThermalSlowdown: "thermal limit",
            nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
            nvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
        }
        held = self._get(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)) or 0
        return tuple(words for bit, words in reasons.items() if held & bit)

    def _pcie_width(self) -> tuple[int, int]:
        nvml, handle = self._nvml, self._handle
        return int(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)), int(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))

    def _link(self) -> tuple[float | None, str]:
        """What it sends to other GPUs of its host at best, one way."""
        nvlinks = sum(bool(self._get(lambda n=n: self._nvlink_is_active(n))) for n in range(18))  # type: ignore[misc]
        speed = self._get(self._nvlink_speed) if nvlinks else None
        if speed:
            return nvlinks * speed, f"{nvlinks} NVLinks"
        pcie = (
            self._get(lambda: self._nvml.nvmlDeviceGetMaxPcieLinkGeneration(self._handle)),
            self._get(self._pcie_width),
        )
        if None in pcie or pcie[0] not in _LANE:
            return None, ""
        return pcie[1][0] * _LANE[pcie[0]], f"PCIe {pcie[0]} x{pcie[1][0]}"

    def _nvlink_is_active(self, link: int) -> bool:
        return bool(self._nvml.nvmlDeviceGetNvLinkState(self._handle, link))

    def _nvlink_speed(self) -> float:
        """Bytes per second of one link, one way."""
        value = self._nvml.nvmlDeviceGetFieldValues(self._handle, [self._nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON])[0]
        return 0.0 if value.nvmlReturn else float(value.value.uiVal * 1e6)
