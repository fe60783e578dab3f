"""`mixmae bench step`: the bare training step, in several ways of computing it, beside published code's.

Forward pass, backward pass and AdamW on random pixels that lie on the device. Variants take turns, step by step, with a
large matrix product between, so that all see the same machine; medians are compared. MFU is the model's operations in a
second (those of the method, where all tokens of a window see each other, without recomputation) over the product's.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.trainer.benchmarks.profiling import kernel_shares, peak_allocated, profiled, settled
from mixmae.trainer.benchmarks.recipe import recipe_of
from mixmae.trainer.benchmarks.results import RESULTS, circumstances, write_measurements
from mixmae.trainer.benchmarks.variants import VARIANTS, BareStep
from mixmae.trainer.engine.malloc import keep_freed_memory
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.flops import model_flops
from mixmae.trainer.tasks.registry import task_of

_SIDES = {"cpu": 4096, "cuda": 8192}
"""Of the matrices whose product is the peak."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench step", description=__doc__)
    parser.add_argument("--model", default="mixmae_swin_base_w14", help="the encoder (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images at once (default %(default)s)")
    parser.add_argument("--variant", default="plain,grouped", help=f"of {','.join(VARIANTS)} (default %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one that is not (default %(default)s)")
    parser.add_argument("--json", action="store_true", help=f"write the measurements to {RESULTS}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, as method.num_images=2")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = _variants(args.variant, device)
    if device.type == "cpu":
        keep_freed_memory()
    recipe = recipe_of(args.model, args.batch, [f"train.precision={args.precision}", *args.overrides])
    measurements = measure(recipe, names, args.steps, device)
    for found in measurements:
        print(_in_words(found))
    if args.json:
        chip = measurements[0]["device"].split("(")[0].strip().lower().replace(" ", "-")
        write_measurements(RESULTS / f"step-{chip}-{args.model}-{recipe.train.precision}.json", measurements)
    return 0


def _variants(given: str, device: torch.device) -> list[str]:
    names = given.split(",")
    for name in names:
        if name not in VARIANTS:
            raise UsageError(f"--variant {given}: {name!r} is none of {', '.join(VARIANTS)}")
        if VARIANTS[name].cuda_only and device.type != "cuda":
            raise UsageError(f"--variant {name} needs a GPU, and torch sees none here; leave it out")
    return names


def measure(recipe: Recipe, names: Sequence[str], steps: int, device: torch.device) -> list[dict[str, Any]]:
    """One object for each variant, in the order given."""
    torch.manual_seed(0)
    task = task_of(recipe)
    recipe, batch, side = task.recipe, recipe.train.micro_batch, recipe.encoder.img_size
    images = torch.randn(batch, 3, side, side, device=device)
    bare = {name: BareStep(recipe, VARIANTS[name], device) for name in names}
    inputs = [part.to(device) for part in task.example_inputs(bare[names[0]].model, batch)]
    memory = {name: _memory(step, images, inputs, device) for name, step in bare.items()}
    product = _product(recipe.train.precision, device)
    times: dict[str, list[float]] = {name: [] for name in names}
    rates: list[float] = []
    for turn in range(steps):
        rates.append(product())
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:  # none always follows the same one
            times[name].append(_seconds(partial(bare[name], images, inputs), device))
    shares = {
        name: kernel_shares(profiled(partial(step, images, inputs), device), device) for name, step in bare.items()
    }
    peak, flops = statistics.median(rates), model_flops(recipe)
    rate = {name: batch / statistics.median(times[name]) for name in names}
    reference = next((rate[name] for name in names if name.startswith("plain")), None)
    where = circumstances()
    return [
        {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else where["cpu"],
            "model": recipe.encoder.name,
            "num_images": recipe.method.settings.get("num_images"),
            "variant": name,
            "words": VARIANTS[name].words,
            "precision": recipe.train.precision,
            "checkpointing": recipe.train.activation_checkpointing.kind,
            "batch": batch,
            "images_per_second": round(rate[name], 3),
            "step_seconds": round(statistics.median(times[name]), 5),
            "step_seconds_spread": [round(min(times[name]), 5), round(max(times[name]), 5)],
            "gflop_per_image": round(flops / 1e9, 1),
            "model_tflops": round(rate[name] * flops / 1e12, 4),
            "peak_tflops": round(peak / 1e12, 4),
            "mfu": round(rate[name] * flops / peak, 4),
            "peak_memory_bytes": memory[name],
            "ratio_to_plain": None if reference is None else round(rate[name] / reference, 3),
            "kernel_shares": shares[name],
            **where,
        }
        for name in names
    ]  # fmt: skip


def _memory(step: BareStep, images: torch.Tensor, inputs: Sequence[Tensor], device: torch.device) -> int:
    """Peak bytes of the second step, weights and optimizer states included; the first warms everything up."""
    step(images, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        others = torch.cuda.memory_allocated(device) - step.bytes
        torch.cuda.reset_peak_memory_stats(device)
        step(images, inputs)
        return torch.cuda.max_memory_allocated(device) - others
    return step.bytes + peak_allocated(profiled(lambda: step(images, inputs), device))


def _product(precision: str, device: torch.device) -> Callable[[], float]:
    """A large matrix product; a call returns operations per second."""
    side = _SIDES[device.type]
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

    def rate() -> float:
        repeats = 20 if device.type == "cuda" else 1
        return repeats * 2 * side**3 / _seconds(lambda: [x @ x for _ in range(repeats)], device)

    rate()
    return rate


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = settled(device)
    work()
    return settled(device) - started


def _in_words(found: dict[str, Any]) -> str:
    low, high = found["step_seconds_spread"]
    ratio = "" if found["ratio_to_plain"] is None else f", {found['ratio_to_plain']:.2f} times plain"
    largest = ", ".join(f"{name} {share:.0%}" for name, share in list(found["kernel_shares"].items())[:5])
    return (
        f"{found['variant']:<15} {found['images_per_second']:.2f} images/s{ratio}; step {found['step_seconds']:.3f} s "
        f"({low:.3f} to {high:.3f}); {found['model_tflops']:.3g} TFLOP/s, MFU {found['mfu']:.1%} of "
        f"{found['peak_tflops']:.3g}; {found['peak_memory_bytes'] / 1e9:.2f} GB\n{'':<15} {largest}"
    )
