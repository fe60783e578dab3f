"""`mixmae bench step`: variants of the bare training step, compared with published code's.

Forward, backward and AdamW on random pixels that are on the device, with a large matrix product in between; all
variants share weights and optimizer states. On a CPU, which other processes may use, variants are interleaved step by
step, and with one thread (OMP_NUM_THREADS=1) times are processor time; on a GPU they are measured one after the other,
several steps at a time without synchronization, then profiled for how long the device stood still, and with its clock
while it works. Each result is written at once. Medians are compared. The share of the
product is the model's FLOP/s (those of the method, with full attention in each window, without recomputation) over
those of the matrix product; an MFU is over the data sheet's.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
from mixmae.trainer.benchmarks.recipe import recipe_of
from mixmae.trainer.benchmarks.results import RESULTS, merge_measurements, metadata
from mixmae.trainer.benchmarks.variants import VARIANTS, BareStep, Weights
from mixmae.trainer.engine.malloc import keep_freed_memory
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.flops import model_flops
from mixmae.trainer.tasks.registry import task_of

_SIDES = {"cpu": 4096, "cuda": 8192}
"""Size of the square matrices whose product gives the peak."""
_AT_ONCE = {"cpu": 1, "cuda": 4}
"""Steps per timing."""
_KEYS = ("model", "method", "variant", "batch", "num_images", "checkpointing")
"""Fields that identify a measurement in a file."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench step", description=__doc__)
    parser.add_argument("--model", default="mixmae_swin_base_w14", help="encoders, as a,b (default %(default)s)")
    parser.add_argument("--method", default="mixmae", help="methods, as mixmae,simmim,mae (default %(default)s)")
    parser.add_argument("--batch", default="8", help="micro-batches, such as 64,128 (default %(default)s)")
    parser.add_argument(
        "--variant", help=f"from {','.join(VARIANTS)} (default plain,grouped for MixMAE on Swin, else grouped)"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed, after a warm-up step (default %(default)s)")
    parser.add_argument("--json", action="store_true", help=f"write the measurements to {RESULTS}")
    parser.add_argument("--kernels", type=Path, help="append a table of each variant's kernels to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, as method.num_images=2")
    args = parser.parse_intermixed_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models, methods = args.model.split(","), args.method.split(",")
    chosen = [(model, method, _variants(args.variant, model, method, device)) for model in models for method in methods]
    if device.type == "cpu":
        keep_freed_memory()
    table: list[dict[str, Any]] = []
    refused: UsageError | None = None
    for model, method, names in chosen:
        own = [f"method.name={method}", f"train.precision={args.precision}"]
        recipes = [recipe_of(model, int(batch), [*own, *args.overrides]) for batch in args.batch.split(",")]
        try:
            task_of(recipes[0]).check()
        except UsageError as error:
            if len(chosen) == 1:
                raise
            print(f"{model} by {method} is left out: {error}", flush=True)
            continue
        for recipe in recipes:
            try:
                for found, kernels in measure(recipe, names, args.steps, device):
                    print(_describe(found), flush=True)
                    table.append(found)
                    if args.json:
                        merge_measurements(_file(found, compared=len(chosen) > 1), [found], _KEYS)
                    if args.kernels is not None:
                        with args.kernels.open("a") as out:
                            out.write(f"{_title(found)}\n{kernels}\n\n")
            except UsageError as error:  # other batches can be measured
                refused = error
    if len(chosen) > 1:
        print("\n" + comparison(table))
    if refused is not None:
        raise refused
    return 0


def _variants(given: str | None, model: str, method: str, device: torch.device) -> list[str]:
    is_published = method == "mixmae" and model.startswith("mixmae_swin")
    if given is None:
        return ["plain", "grouped"] if is_published else ["grouped"]
    names = given.split(",")
    for name in names:
        if name not in VARIANTS:
            raise UsageError(f"--variant {given}: unknown variant {name!r}, expected {', '.join(VARIANTS)}")
        if VARIANTS[name].cuda_only and device.type != "cuda":
            raise UsageError(f"--variant {name} needs a GPU, and torch finds none; omit it")
        if VARIANTS[name].is_published and not is_published:
            raise UsageError(f"--variant {name} is MixMAE's on Swin, not {model} by {method}; take grouped or compiled")
    return names


def _file(found: dict[str, Any], compared: bool) -> Path:
    """Where a measurement is written: to that of its model and method, or to one of all that are compared."""
    chip = found["device"].split("(")[0].strip().lower().replace(" ", "-")
    if compared:
        return RESULTS / f"methods-{chip}-{found['precision']}.json"
    by = "" if found["method"] == "mixmae" else f"-{found['method']}"
    return RESULTS / f"step-{chip}-{found['model']}{by}-{found['precision']}.json"


def comparison(table: Sequence[dict[str, Any]]) -> str:
    """Encoders and methods side by side, a Markdown table.

    They differ in operations for an image; at equal ones they compare by the seconds that a TFLOP of the model's takes
    or, where the machine was busier with one than with another, by the share of the matrix product's rate.
    """
    lines = [
        "| encoder | method | GFLOP/image | images/s | step (s) | s/TFLOP | of product | peak GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in table:
        cells = [
            found["model"].removeprefix("mixmae_"), _method(found), f"{found['gflop_per_image']:.1f}",
            f"{found['images_per_second']:.2f}", f"{found['step_seconds']:.3f}", f"{1 / found['model_tflops']:.2f}",
            f"{found['share_of_product']:.1%}", f"{found['peak_memory_bytes'] / 1e9:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _method(found: dict[str, Any]) -> str:
    k = "" if found["num_images"] is None else f" K={found['num_images']}"
    return f"{found['method']}{k}, {found['variant']}"


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
    for together in [[name] for name in names] if device.type == "cuda" else [names]:
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


def _title(found: dict[str, Any]) -> str:
    return (
        f"{found['device']}: {found['model']}, {_method(found)}, batch {found['batch']}, "
        f"{found['step_seconds'] * 1000:.1f} ms per step"
    )


def _describe(found: dict[str, Any]) -> str:
    low, high = found["step_seconds_spread"]
    ratio = "" if found["ratio_to_plain"] is None else f", {found['ratio_to_plain']:.2f} times plain"
    host = "" if found["host_seconds"] is None else f"; the host {found['host_seconds']:.3f} s of it"
    clock = "" if found.get("clock_mhz") is None else f", at {found['clock_mhz']} MHz"
    largest = ", ".join(f"{name} {share:.0%}" for name, share in list(found["kernel_shares"].items())[:5])
    return (
        f"{found['model'].removeprefix('mixmae_')} by {_method(found)}, batch {found['batch']}\n"
        f"{found['variant']:<15} {found['images_per_second']:.2f} images/s{ratio}; step {found['step_seconds']:.3f} s "
        f"({low:.3f} to {high:.3f}{host}{clock}); {found['model_tflops']:.3g} TFLOP/s, "
        f"{found['share_of_product']:.1%} of {found['peak_tflops']:.3g}; {found['peak_memory_bytes'] / 1e9:.2f} GB\n"
        f"{'':<15} {largest}{_idle(found)}"
    )


def _idle(found: dict[str, Any]) -> str:
    if "idle_seconds" not in found:
        return ""
    gaps = ", ".join(f"{gap} {seconds * 1e3:.1f}" for gap, seconds in found["idle_by_gap"].items())
    return (
        f"\n{'':<15} the GPU did nothing for {found['idle_seconds'] * 1e3:.1f} ms of a step ({gaps}) between "
        f"{found['kernels']} kernels of {found['busy_seconds'] * 1e3:.1f} ms"
    )
