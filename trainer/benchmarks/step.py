"""`mixmae bench step`: variants of the bare training step, compared with published code's.

Forward, backward and AdamW on random pixels that are on the device, with a large matrix product in between; all
variants share weights and optimizer states. On a CPU, which other processes may use, variants are interleaved step by
step, and with one thread (OMP_NUM_THREADS=1) times are processor time; on a GPU they are measured one after the other,
several steps at a time without synchronization, then profiled for how long the device stood still, and with its clock
while it works. Each result is written at once. Medians are compared. The share of the product is the model's FLOP/s
(those of the method, with full attention in each window, without recomputation) over those of the matrix product; an
MFU is over the data sheet's.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mixmae.base.errors import UsageError
from mixmae.trainer.benchmarks.recipe import recipe_of
from mixmae.trainer.benchmarks.results import RESULTS, merge_measurements
from mixmae.trainer.benchmarks.step_times import measure
from mixmae.trainer.benchmarks.variants import VARIANTS
from mixmae.trainer.engine.malloc import keep_freed_memory
from mixmae.trainer.tasks.registry import task_of

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
