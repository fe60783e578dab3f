"""Time and memory of a step, by torch's profiler."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_NAME_LENGTH = 110
"""Maximum length of a kernel's name in tables."""
_GAPS = (2, 10, 100)
"""Microseconds: a kernel follows another of its stream after one or two; after ten and more it was started too late."""


def synchronized_time(device: torch.device) -> float:
    """Synchronizes the device, then returns `time.perf_counter()`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def profiled(work: Callable[[], object], device: torch.device, kernels_alone: bool = False) -> Any:
    """Profiles one call, with allocations on a CPU.

    Args:
        kernels_alone: of a GPU; noting operators too takes the host so long that the device waits.
    """
    activities = [] if kernels_alone else [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=activities, profile_memory=device.type == "cpu") as profiler:
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    del result
    return profiler


def standstill(profiler: Any, steps: int) -> dict[str, Any]:
    """How long a GPU did nothing between a profile's first kernel and its end.

    Args:
        steps: in the profile.

    Returns:
        For a step: `busy_seconds`, in one kernel or more; `idle_seconds`, in none; `idle_by_gap`, the same by how long
        the device stood still at a time; `kernels`, their number. Empty where the profile has no kernels.
    """
    times = sorted((one.time_range.start, one.time_range.end) for one in profiler.events() if _is_kernel(one))
    if not times:
        return {}
    names = [f"under {_GAPS[0]} us", *(f"{low} to {high} us" for low, high in pairwise(_GAPS)), f"over {_GAPS[-1]} us"]
    by_gap, busy, end = dict.fromkeys(names, 0.0), 0.0, times[0][0]
    for start, own_end in times:
        gap = max(0.0, start - end)
        by_gap[names[sum(gap >= bound for bound in _GAPS)]] += gap
        busy += max(0.0, own_end - max(start, end))
        end = max(end, own_end)
    seconds = {name: round(microseconds / steps / 1e6, 9) for name, microseconds in by_gap.items()}
    return {
        "busy_seconds": round(busy / steps / 1e6, 9),
        "idle_seconds": round(sum(by_gap.values()) / steps / 1e6, 9),
        "idle_by_gap": seconds,
        "kernels": round(len(times) / steps),
    }


def _is_kernel(event: Any) -> bool:
    """Operators and annotations include the time of the kernels that they launched."""
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def peak_allocated(profiler: Any) -> int:
    """Peak bytes of host memory allocated during the profile."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def kernel_shares(profiler: Any, rows: int = 12) -> dict[str, float]:
    """Fractions of the time spent in kernels (operators on a CPU), largest first, the rest as `other`."""
    times = {name: milliseconds for name, milliseconds, _ in _times(profiler)}
    total = sum(times.values()) or 1.0
    largest = sorted(times, key=lambda name: -times[name])[:rows]
    shares = {_short(name): round(times[name] / total, 4) for name in largest}
    return {**shares, "other": round(1 - sum(shares.values()), 4)}


def kernel_table(profiler: Any, rows: int = 40) -> str:
    """Milliseconds, calls and names of the slowest kernels (operators on a CPU); the first line is the total."""
    times = sorted(_times(profiler), key=lambda row: -row[1])
    lines = [f"{milliseconds:9.3f} ms {calls:5d}  {_short(name)}" for name, milliseconds, calls in times[:rows]]
    return "\n".join([f"{sum(row[1] for row in times):9.3f} ms in {sum(row[2] for row in times)} calls", *lines])


def _times(profiler: Any) -> list[tuple[str, float, int]]:
    """Names, milliseconds and calls of kernels, else of operators; times do not overlap."""
    events = profiler.key_averages()
    if kernels := list(filter(_is_kernel, events)):
        return [(one.key, one.self_device_time_total / 1000, one.count) for one in kernels]
    return [(one.key, one.self_cpu_time_total / 1000, one.count) for one in events]


def _short(name: str) -> str:
    """Truncates long names."""
    return name if len(name) <= _NAME_LENGTH else name[:_NAME_LENGTH] + "..."
