"""What a run directory says of its run: recipe, shards and versions; written by one start, compared by the next."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mixmae.base.errors import UsageError
from mixmae.base.files import atomic_write
from mixmae.base.json_text import parse_json
from mixmae.base.run_directory import RECIPE, REPLACED, SHARDS, VERSIONS, newest_checkpoint, rank_records
from mixmae.base.software import versions
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.recipe.resume_rules import Change, require_same_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.words import shown
from mixmae.trainer.recipe.yaml_files import parse_yaml, read_yaml
from mixmae.trainer.tasks.registry import stored_recipe

_logger = logging.getLogger(__name__)


def check_run_dir(recipe: Recipe, index: ShardIndex, change: bool = False) -> list[Change] | None:
    """What the recipe changes in a run that has begun; None where the run directory does not say what it was.

    Args:
        change: whether it may change anything.

    Raises:
        UsageError: the run directory holds checkpoints of another recipe or other shards.
    """
    if newest_checkpoint(recipe.run_dir) is None:
        return None
    before = _intact(recipe.run_dir / RECIPE, parse_yaml, "run_dir")
    changes = None
    if before is not None:
        stored = stored_recipe(before, str(recipe.run_dir / RECIPE))
        changes = require_same_recipe(recipe, stored, recipe.run_dir, change)
    earlier = _intact(recipe.run_dir / SHARDS, parse_json, "fingerprint")
    if earlier is not None and earlier["fingerprint"] != index.fingerprint:
        raise UsageError(
            f"data.shards={recipe.data.where} changed since {recipe.run_dir} was started: "
            f"{index.first_difference(earlier)}; restore the shards or name another run_dir"
        )
    return changes


def _intact(file: Path, parse: Callable[[str], Any], key: str) -> dict[str, Any] | None:
    """A file's content; None where it is missing, or damaged: checkpoints hold the recipe and the fingerprint too."""
    if not file.is_file():
        return None
    try:
        content = parse(file.read_bytes().decode())
    except (ValueError, RecursionError):  # of YAML
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
    atomic_write(recipe.run_dir / RECIPE, yaml.safe_dump(recipe.shown(), sort_keys=False))
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
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UsageError(f"{file} is damaged: it holds {shown(content)}; expected a recipe")
    return stored_recipe(content, str(file))
