"""Where a step's time and memory go, by torch's profiler."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def settled(device: torch.device) -> float:
    """The clock's seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def profiled(work: Callable[[], object], device: torch.device) -> Any:
    """The profiler of one call, with allocations."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, profile_memory=device.type == "cpu") as profiler:
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    del result
    return profiler


def peak_allocated(profiler: Any) -> int:
    """The most bytes of host memory that were allocated at once, beside those that were there before."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def kernel_shares(profiler: Any, device: torch.device, rows: int = 12) -> dict[str, float]:
    """Shares of the time spent in kernels (operators, on a CPU), largest first, the rest as `other`."""
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {
        event.key: float(getattr(event, attribute))
        for event in profiler.key_averages()
        if device.type == "cpu" or event.self_device_time_total
    }
    total = sum(times.values()) or 1.0
    largest = sorted(times, key=lambda name: -times[name])[:rows]
    shares = {name: round(times[name] / total, 4) for name in largest}
    return {**shares, "other": round(1 - sum(shares.values()), 4)}
