"""What a run writes into its run directory and reads of it again; the names are in mixmae.base.run_directory."""

import importlib.metadata
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mixmae.base import jsonl
from mixmae.base.errors import UsageError
from mixmae.base.files import atomic_write
from mixmae.base.jsonl import JsonLines
from mixmae.base.run_directory import EVENTS, RECIPE, REPLACED, SHARDS, VERSIONS, newest_checkpoint, rank_records
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.recipe.resume_rules import require_same_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.registry import stored_recipe

_logger = logging.getLogger(__name__)

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
    before = _intact(recipe.run_dir / RECIPE, yaml.safe_load, "run_dir")
    if before is not None:
        require_same_recipe(recipe, stored_recipe(before, str(recipe.run_dir / RECIPE)), recipe.run_dir)
    earlier = _intact(recipe.run_dir / SHARDS, json.loads, "fingerprint")
    if earlier is not None and earlier["fingerprint"] != index.fingerprint:
        raise UsageError(
            f"data.shards={recipe.data.shards} changed since {recipe.run_dir} was started: "
            f"{index.first_difference(earlier)}; restore the shards or name another run_dir"
        )


def _intact(file: Path, parse: Callable[[str], Any], key: str) -> dict[str, Any] | None:
    """A file's content; None where it is missing, or damaged: checkpoints hold the recipe and the fingerprint too."""
    if not file.is_file():
        return None
    try:
        content = parse(file.read_bytes().decode())
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict) or key not in content:
        _logger.warning("%s is damaged and is written anew; the checkpoint's own copy counts", file)
        return None
    return content


def replaced_file(run_dir: Path, rank: int) -> Path:
    """Where a rank names the samples that it could not use."""
    return rank_records(run_dir / REPLACED, rank)


def write_run_dir(recipe: Recipe, index: ShardIndex) -> None:
    """Creates the run directory and says in it what runs; for the main rank, after every rank checked."""
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(recipe.run_dir / RECIPE, recipe.to_yaml())
    atomic_write(recipe.run_dir / SHARDS, json.dumps(index.listing()) + "\n")
    atomic_write(recipe.run_dir / VERSIONS, json.dumps(versions(), indent=1) + "\n")


def read_recipe(run_dir: Path) -> Recipe:
    """The resolved recipe of a run.

    Raises:
        UsageError: `run_dir` is not a run directory.
    """
    file = run_dir / RECIPE
    if not file.is_file():
        raise UsageError(f"{run_dir} is not a run directory: it has no {RECIPE}")
    return stored_recipe(yaml.safe_load(file.read_text()), str(file))


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
        self._lines = JsonLines(run_dir / EVENTS)

    def write(self, event: str, **fields: Any) -> None:
        """Appends an event.

        Raises:
            OSError: it could not be written, or not all of it.
        """
        self._lines.write({"event": event, "time": round(time.time(), 3), **fields})

    def close(self) -> None:
        self._lines.close()


def read_events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The events of one kind, by step; of a step that was done again after a restart, the last."""
    records = _records(run_dir)
    by_step = {
        record["step"]: record for record in records if record["event"] == event and isinstance(record.get("step"), int)
    }
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
    return jsonl.read(run_dir / EVENTS, "event")
