"""The times of variants of the bare training step, as `mixmae bench step` compares them."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.trainer.benchmarks.profiling import (
    kernel_shares,
    kernel_table,
    peak_allocated,
    profiled,
    standstill,
    synchronized_time,
)
from mixmae.trainer.benchmarks.results import metadata
from mixmae.trainer.benchmarks.variants import VARIANTS, BareStep, Weights
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.flops import model_flops
from mixmae.trainer.tasks.registry import task_of

_SIDES = {"cpu": 4096, "cuda": 8192}
"""Size of the square matrices whose product gives the peak."""
_AT_ONCE = {"cpu": 1, "cuda": 4}
"""Steps per timing."""


@dataclass
class _Timed:
    """A warmed-up variant with its measurements."""

    step: BareStep
    memory: int
    times: list[float]
    host_times: list[float]
    """Until the host has started all work of a step; the device may need longer."""


def measure(
    recipe: Recipe, names: Sequence[str], steps: int, device: torch.device
) -> Iterator[tuple[dict[str, Any], str]]:
    """One result per variant, in order, with a table of its kernels; variants that do not fit are skipped."""
    torch.manual_seed(0)
    task = task_of(recipe)
    recipe, batch = task.recipe, recipe.train.micro_batch
    images = torch.randn(batch, *recipe.image_shape, device=device)
    weights = Weights(recipe, device)
    inputs = [part.to(device) for part in task.example_inputs(weights.model, batch)]
    product, flops = _product(recipe.train.precision, device), model_flops(recipe)
    reference: float | None = None
    refused: list[UsageError] = []
    for together in _held_together(names, device):
        timed = dict(_warmed_up(recipe, together, device, weights, (images, inputs), refused))
        peak = statistics.median(_interleave(timed, (images, inputs), steps, product, device) or [0.0])
        rates = {name: batch / statistics.median(one.times) for name, one in timed.items()}
        reference = next((rate for name, rate in rates.items() if name.startswith("plain")), reference)
        for name, one in timed.items():
            work = partial(one.step, images, inputs)
            profile = profiled(work, device)
            found = _measurement(recipe, name, one, (rates[name], reference), (flops, peak), device)
            if device.type == "cuda":
                found |= _under_load(work, device)
            yield {**found, "kernel_shares": kernel_shares(profile), **metadata()}, kernel_table(profile)
    if refused:
        raise refused[0]


def _held_together(names: Sequence[str], device: torch.device) -> list[list[str]]:
    """Which variants are in memory at once: on a CPU all, which take turns; on a GPU each alone."""
    return [[name] for name in names] if device.type == "cuda" else [list(names)]


def _under_load(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """The GPU's clock while it works, and how long it stands still in as many steps as are timed at once."""
    repeated = partial(_repeat, work, _AT_ONCE[device.type])
    repeated()
    clock = _clock(device)  # before all is done: the clock rises as soon as nothing is
    torch.cuda.synchronize(device)
    return {"clock_mhz": clock, **standstill(profiled(repeated, device, kernels_alone=True), _AT_ONCE[device.type])}


def _warmed_up(
    recipe: Recipe,
    names: Sequence[str],
    device: torch.device,
    weights: Weights,
    inputs: tuple[Tensor, Sequence[Tensor]],
    refused: list[UsageError],
) -> Iterator[tuple[str, _Timed]]:
    """
    Args:
        refused: why variants cannot be measured, which others do not suffer from.
    """
    for name in names:
        try:
            step = BareStep(recipe, VARIANTS[name], device, weights)
            yield name, _Timed(step, _memory(step, *inputs, device), [], [])
        except UsageError as error:
            print(f"{name:<15} is left out: {error}", flush=True)
            refused.append(error)
        except torch.OutOfMemoryError as error:
            print(f"{name:<15} batch {len(inputs[0])} does not fit: {str(error).splitlines()[0]}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _interleave(
    timed: dict[str, _Timed],
    inputs: tuple[Tensor, Sequence[Tensor]],
    steps: int,
    product: Callable[[], float],
    device: torch.device,
) -> list[float]:
    """Times all variants; returns the matrix product's rates between them."""
    rates: list[float] = []
    names, repeats = list(timed), _AT_ONCE[device.type]
    for turn in range(steps if names else 0):
        rates.append(product())
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:  # rotated, so that none always follows the same one
            work = partial(_repeat, partial(timed[name].step, *inputs), repeats)
            seconds, host_seconds = _seconds(work, device)
            timed[name].times.append(seconds / repeats)
            timed[name].host_times.append(host_seconds / repeats)
    return rates


def _measurement(
    recipe: Recipe,
    name: str,
    timed: _Timed,
    rates: tuple[float, float | None],
    of_model: tuple[float, float],
    device: torch.device,
) -> dict[str, Any]:
    """The result of one variant.

    Args:
        rates: its images per second, and those of the plain variant.
        of_model: FLOPs per image, and the matrix product's FLOP/s.
    """
    (rate, reference), (flops, peak) = rates, of_model
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else metadata()["cpu"],
        "model": recipe.encoder.name,
        "method": recipe.method.name,
        "num_images": recipe.method.settings.get("num_images"),
        "variant": name,
        "words": VARIANTS[name].words,
        "precision": recipe.train.precision,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "checkpointing": recipe.train.activation_checkpointing.kind,
        "batch": recipe.train.micro_batch,
        "images_per_second": round(rate, 3),
        "step_seconds": round(statistics.median(timed.times), 5),
        "step_seconds_spread": [round(min(timed.times), 5), round(max(timed.times), 5)],
        "host_seconds": round(statistics.median(timed.host_times), 5) if device.type == "cuda" else None,
        "gflop_per_image": round(flops / 1e9, 1),
        "model_tflops": round(rate * flops / 1e12, 6),
        "peak_tflops": round(peak / 1e12, 4),
        "share_of_product": round(rate * flops / peak, 4),
        "peak_memory_bytes": timed.memory,
        "ratio_to_plain": None if reference is None else round(rate / reference, 3),
    }


def _memory(step: BareStep, images: torch.Tensor, inputs: Sequence[Tensor], device: torch.device) -> int:
    """Peak bytes of the second step, including weights and optimizer states; the first warms up."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step(images, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        others = torch.cuda.memory_allocated(device) - step.bytes
        if not step.is_graphed:  # whose memory is taken when it is recorded, and not seen to be used later
            torch.cuda.reset_peak_memory_stats(device)
            step(images, inputs)
        return torch.cuda.max_memory_allocated(device) - others
    return step.bytes + peak_allocated(profiled(lambda: step(images, inputs), device))


def _product(precision: str, device: torch.device) -> Callable[[], float]:
    """A large matrix product; a call returns its FLOP/s."""
    side = _SIDES[device.type]
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

    def rate() -> float:
        repeats = 20 if device.type == "cuda" else 1
        return repeats * 2 * side**3 / _seconds(partial(_repeat, lambda: x @ x, repeats), device)[0]

    rate()
    return rate


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def _seconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds until the work is done, and until the host has started all of it."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if alone else partial(synchronized_time, device)
    started, began = now(), time.perf_counter()
    work()
    host_seconds = time.perf_counter() - began
    return now() - started, host_seconds


def _clock(device: torch.device) -> int | None:
    """The GPU's clock in MHz; None without nvidia-ml-py (the extra `gpu`), and where the driver does not say."""
    with suppress(Exception):  # pynvml's have no base that is there without pynvml
        return torch.cuda.clock_rate(device)
    return None
