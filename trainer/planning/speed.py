"""Compute speed of one GPU: measured, if benchmarks/results has this model on this GPU, else modelled by a roofline."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmae.base.errors import UsageError
from mixmae.base.image_size import both_sides
from mixmae.base.json_text import parse_json
from mixmae.trainer.planning.devices import Gpu
from mixmae.trainer.planning.roofline import ERROR, step_model
from mixmae.trainer.recipe.schema import Recipe

ASSUMED_MFU = 0.4
"""In fp32, of whose rates the roofline knows nothing."""

_SIZES = (16, 128)
"""Micro-batches whose steps are modelled."""


@dataclass(frozen=True)
class Speed:
    """Compute speed of one GPU, without communication and recomputation."""

    flops: float
    """Model FLOP/s, beside what each pass and step takes anyway."""
    mfu: float
    """Fraction of the GPU's peak, at the recipe's micro-batch."""
    source: str
    per_pass: float = 0.0
    """Seconds of each micro-batch, whatever its size."""
    per_step: float = 0.0
    """Seconds of the optimizer."""

    def seconds(self, flops: float, passes: int) -> float:
        """Of a step of so many model FLOPs, in so many micro-batches."""
        return flops / self.flops + passes * self.per_pass + self.per_step


def speed(recipe: Recipe, gpu: Gpu, mfu: float | None, results: Path, ranks: int = 1) -> Speed:
    """The given MFU, else the best measured one of this model on this GPU in this precision, else the roofline's.

    Args:
        ranks: that share the optimizer's work.
    """
    peak = gpu.peak(recipe.train.precision)
    if mfu is not None:
        return Speed(mfu * peak, mfu, "given with --mfu")
    found = max(_measured(recipe, gpu, results), default=None)
    if found is not None:
        flops, file = found
        return Speed(flops, flops / peak, f"measured: {file}")
    why = f"no measurement of this model on this GPU in {results}"
    if recipe.train.precision == "fp32":
        return Speed(ASSUMED_MFU * peak, ASSUMED_MFU, f"assumed: {why}")
    return _modelled(recipe, gpu, ranks, f"modelled by a roofline, to {ERROR:.0%}: {why}")


def _modelled(recipe: Recipe, gpu: Gpu, ranks: int, source: str) -> Speed:
    """By two steps, between which time is linear in the micro-batch."""
    small, large = (step_model(recipe, gpu, size, ranks) for size in _SIZES)
    image = (large.kernels - small.kernels) / (_SIZES[1] - _SIZES[0])
    per_pass = max(0.0, small.kernels - _SIZES[0] * image) + small.host
    flops, batch = large.mfu * gpu.bf16 * large.seconds / _SIZES[1], recipe.train.micro_batch
    seconds = batch * image + per_pass + small.optimizer
    return Speed(flops / image, batch * flops / seconds / gpu.bf16, source, per_pass, small.optimizer)


def _measured(recipe: Recipe, gpu: Gpu, results: Path) -> Iterator[tuple[float, str]]:
    """FLOP/s of the matching results, with file name and variant."""
    wanted = {
        "model": recipe.encoder.name,
        "img_size": both_sides(recipe.encoder.img_size),
        "precision": recipe.train.precision,
    }
    method = recipe.method.name
    for file in sorted(results.glob("*.json")):
        for entry in entries(file):
            recorded = {key: entry.get(key, value) for key, value in wanted.items()}
            recorded["img_size"] = both_sides(recorded["img_size"])
            is_same = recorded == wanted and entry.get("method", "mixmae") == method
            if "model" in entry and is_same and gpu.product in str(entry.get("device")):
                yield entry["model_tflops"] * 1e12, f"{file.name}, {_variant(entry)}"


def _variant(entry: dict[str, Any]) -> str:
    """How the step was computed: a recipe with another variant is slower than planned."""
    fields = {"variant": entry.get("variant"), "K =": entry.get("num_images"), "batch": entry.get("batch")}
    return ", ".join(f"{name} {value}" for name, value in fields.items() if value is not None)


def entries(file: Path) -> list[dict[str, Any]]:
    """A result file's measurements: one object, or a list of them.

    Raises:
        UsageError: the file is not JSON.
    """
    try:
        content = parse_json(file.read_text())
    except ValueError as error:
        raise UsageError(f"{file} is not JSON ({error}); remove or fix it") from error
    return [entry for entry in (content if isinstance(content, list) else [content]) if isinstance(entry, dict)]
