"""NVML of a node with two GPUs: percent, milliwatts and degrees, of which the second tells no power."""

from types import SimpleNamespace

NVML_TEMPERATURE_GPU = 0


class NVMLError(Exception):
    pass


def nvmlInit() -> None: ...  # noqa: N802


def nvmlDeviceGetCount() -> int:  # noqa: N802
    return 2


def nvmlDeviceGetHandleByIndex(number: int) -> int:  # noqa: N802
    return number


def nvmlDeviceGetUtilizationRates(device: int) -> SimpleNamespace:  # noqa: N802
    return SimpleNamespace(gpu=[87, 0][device], memory=41)


def nvmlDeviceGetPowerUsage(device: int) -> int:  # noqa: N802
    if device == 1:
        raise NVMLError
    return 612_500


def nvmlDeviceGetTemperature(device: int, sensor: int) -> int:  # noqa: N802
    assert sensor == NVML_TEMPERATURE_GPU
    return [64, 31][device]
