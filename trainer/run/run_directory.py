"""The run directory: one place for all that a run leaves behind.

recipe.yaml     resolved, with every default       events.jsonl   one line per logged step and per event
versions.json   what it ran with                   tensorboard/   curves and pictures
checkpoints/    see trainer.checkpoint             pictures/      reconstructions, step by step
shards.json     the shards it is trained on        replaced/      by rank, samples that could not be used
samples/        by rank, which each step used, if log.samples is on
"""

import errno
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mixmae.base.errors import UsageError
from mixmae.trainer.checkpoints.layout import newest_checkpoint
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.recipe.loading import parse_recipe
from mixmae.trainer.recipe.resume_rules import require_same_recipe
from mixmae.trainer.recipe.schema import Recipe

RECIPE, SHARDS, EVENTS = "recipe.yaml", "shards.json", "events.jsonl"
_ATTEMPT, _REFUSED = "attempt", "refused"
_ENDS = {"preempted": "preempted", "failed": "failed", "end": "finished"}
"""Events that end an attempt; one without them was killed."""
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
        difference = index.difference_from_listing(shards)
        if difference is not None:
            raise UsageError(
                f"data.shards={recipe.data.shards} changed since {recipe.run_dir} was started: "
                f"{difference}; restore the shards or name another run_dir"
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
    """`events.jsonl`: append-only, one JSON object a line, on disk as written; null where a number is not finite."""

    def __init__(self, run_dir: Path) -> None:
        file = run_dir / EVENTS
        self._torn = file.is_file() and not file.read_bytes().endswith(b"\n")
        """Whether the file ends within a line: what a killed run, or a full disk, left of one."""
        self._file = file.open("ab", buffering=0)

    def write(self, event: str, **fields: Any) -> None:
        """Appends an event.

        Raises:
            OSError: it could not be written, or not all of it.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        line = json.dumps({"event": event, "time": round(time.time(), 3), **finite}).encode() + b"\n"
        whole = b"\n" + line if self._torn else line
        written = self._file.write(whole)
        if written:
            self._torn = written < len(whole)
        if written < len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()


def read_events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The events of one kind, by step; of a step that was done again after a restart, the last."""
    by_step = {record["step"]: record for record in _records(run_dir) if record["event"] == event}
    return [by_step[step] for step in sorted(by_step)]


def begin_attempt(run_dir: Path) -> list[str]:
    """Records that the run is about to start; returns how each attempt before ended, see `past_ends`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    ends = past_ends(run_dir)
    again = f"starting again; attempts before: {len(ends)}, the last of them {ends[-1]}" if ends else "starting"
    _note(run_dir, _ATTEMPT, message=again)
    return ends


def refuse_attempt(run_dir: Path, why: str) -> None:
    """Records that the start was refused: no attempt at all."""
    _note(run_dir, _REFUSED, message=why)


def _note(run_dir: Path, event: str, **fields: Any) -> None:
    events = Events(run_dir)
    events.write(event, **fields)
    events.close()


def past_ends(run_dir: Path) -> list[str]:
    """How each attempt at the run ended so far, one of `mixmae.monitoring.metrics.ENDS`, oldest first."""
    ends: list[str] = []
    for record in _records(run_dir):
        event = record["event"]
        if event == _ATTEMPT:
            ends.append("killed")
        elif event == _REFUSED and ends:
            ends.pop()
        elif event in _ENDS and ends:
            ends[-1] = _ENDS[event]
    return ends


def restarted(ends: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """What the first event of an attempt says of the ones before: how the last ended, and Slurm's count of restarts."""
    fields: dict[str, Any] = {"reason": ends[-1]} if ends else {}
    if env.get("SLURM_RESTART_COUNT", "").isdigit():
        fields["slurm_restart_count"] = int(env["SLURM_RESTART_COUNT"])
    return fields


def _records(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / EVENTS
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
