"""The run directory: one place for all that a run leaves behind.

recipe.yaml     resolved, with every default       events.jsonl   one line per logged step and per event
versions.json   what it ran with                   tensorboard/   curves and pictures
checkpoints/    see trainer.checkpoint             pictures/      reconstructions, step by step
shards.json     the shards it is trained on        replaced/      by rank, samples that could not be used
samples/        by rank, which each step used, if log.samples is on
"""

import importlib.metadata
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import yaml

from trainer.checkpoints.layout import newest_checkpoint
from trainer.config import Recipe
from trainer.data.index import ShardIndex
from trainer.errors import UsageError
from trainer.recipes import parse_recipe
from trainer.same_run import require_same_recipe

RECIPE, SHARDS, EVENTS = "recipe.yaml", "shards.json", "events.jsonl"
PACKAGES = (
    "mixmae",
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    "fairscale",
    "webdataset",
    "numpy",
    "pillow",
    "simplejpeg",
)


def check_run_dir(recipe: Recipe, index: ShardIndex) -> None:
    """Raises UsageError if the run directory holds checkpoints of another recipe or other shards."""
    if newest_checkpoint(recipe.run_dir) is None:
        return
    file, shards = recipe.run_dir / RECIPE, recipe.run_dir / SHARDS
    if file.is_file():
        require_same_recipe(recipe, yaml.safe_load(file.read_text()), recipe.run_dir)
    if shards.is_file():
        earlier = json.loads(shards.read_text())
        if earlier["fingerprint"] != index.fingerprint:
            raise UsageError(
                f"data.shards={recipe.data.shards} changed since {recipe.run_dir} was started: "
                f"{index.first_difference(earlier)}; restore the shards or name another run_dir"
            )


def replaced_file(run_dir: Path, rank: int) -> Path:
    """Where a rank names the samples that it could not use."""
    return run_dir / "replaced" / f"rank-{rank:05d}.jsonl"


def write_run_dir(recipe: Recipe, index: ShardIndex) -> None:
    """Creates the run directory and says in it what runs; for the main rank, after every rank checked."""
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    _write(recipe.run_dir / RECIPE, recipe.to_yaml())
    _write(recipe.run_dir / SHARDS, json.dumps(index.listing()) + "\n")
    _write(recipe.run_dir / "versions.json", json.dumps(versions(), indent=1) + "\n")


def _write(file: Path, text: str) -> None:
    """At once or not at all: a run that is killed here must still be able to resume."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(text)
    partial.replace(file)


def read_recipe(run_dir: Path) -> Recipe:
    """The resolved recipe of a run.

    Raises:
        UsageError: `run_dir` is not a run directory.
    """
    file = run_dir / RECIPE
    if not file.is_file():
        raise UsageError(f"{run_dir} is not a run directory: it has no {RECIPE}")
    return parse_recipe(yaml.safe_load(file.read_text()), str(file))


def versions() -> dict[str, str]:
    """What a run ran with."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, or an environment without an optional one
        return "not installed"


class Events:
    """`events.jsonl`: append-only, one JSON object a line, flushed as written; null where a number is not finite."""

    def __init__(self, run_dir: Path) -> None:
        file = run_dir / EVENTS
        cut_short = file.is_file() and not file.read_bytes().endswith(b"\n")
        self._file = file.open("a", buffering=1)
        if cut_short:
            self._file.write("\n")  # what a killed run left of a line ends here

    def write(self, event: str, **fields: Any) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **finite}) + "\n")

    def close(self) -> None:
        self._file.close()


def read_events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The events of one kind, by step; of a step that was done again after a restart, the last."""
    by_step = {record["step"]: record for record in _records(run_dir) if record["event"] == event}
    return [by_step[step] for step in sorted(by_step)]


def count_resumes(run_dir: Path) -> int:
    """How often the run was continued so far."""
    return sum(record["event"] == "resumed" for record in _records(run_dir))


def _records(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / EVENTS
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
