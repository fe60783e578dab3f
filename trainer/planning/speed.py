"""Compute speed of one GPU: measured, if benchmarks/results has this model on this GPU, else by an assumed MFU."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmae.base.errors import UsageError
from mixmae.base.json_text import parse_json
from mixmae.trainer.planning.devices import Gpu
from mixmae.trainer.recipe.schema import Recipe

ASSUMED_MFU = 0.4


@dataclass(frozen=True)
class Speed:
    """Compute speed of one GPU, without communication and recomputation."""

    flops: float
    """Model FLOP/s."""
    mfu: float
    """Fraction of the GPU's peak."""
    source: str


def speed(recipe: Recipe, gpu: Gpu, mfu: float | None, results: Path) -> Speed:
    """The given MFU, else the best measured one of this model on this GPU in this precision, else `ASSUMED_MFU`."""
    peak = gpu.peak(recipe.train.precision)
    if mfu is not None:
        return Speed(mfu * peak, mfu, "given with --mfu")
    found = max(_measured(recipe, gpu, results), default=None)
    if found is not None:
        flops, file = found
        return Speed(flops, flops / peak, f"measured: {file}")
    return Speed(ASSUMED_MFU * peak, ASSUMED_MFU, f"assumed: no measurement of this model on this GPU in {results}")


def _measured(recipe: Recipe, gpu: Gpu, results: Path) -> Iterator[tuple[float, str]]:
    """FLOP/s of the matching results, with file name and variant."""
    wanted = {
        "model": recipe.encoder.name,
        "img_size": recipe.encoder.img_size,
        "precision": recipe.train.precision,
    }
    method = recipe.method.name
    for file in sorted(results.glob("*.json")):
        for entry in entries(file):
            recorded = {key: entry.get(key, value) for key, value in wanted.items()}
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
