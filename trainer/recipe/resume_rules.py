"""Whether a recipe continues the run that a directory holds: what may change, and what would compute something else."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.loading import leaves
from mixmae.trainer.recipe.schema import Recipe

_MAY_CHANGE = (
    "run_dir",
    "data.shards",
    "data.num_workers",
    "data.prefetch_factor",
    "data.max_corrupt_fraction",
    "data.network",
    "data.cache",
    "train.compile",
    "train.fused_attention",
    "train.zero_stage",
    "train.overlap_comm",
    "train.communication_dtype",
    "train.deterministic",
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.max_skipped_steps",
    "plugins",
    "evaluate",
    "segmentation.stride",
    "checkpoint",
    "launch",
    "log",
    "monitoring",
)
"""None of these changes what is computed but for rounding; micro_batch also which images of a batch are mixed."""

_CHANGEABLE = (
    "train.duration",
    "optim",
    "data.crop_scale",
    "data.hflip",
    "encoder.drop_rate",
    "encoder.drop_path_rate",
    "detection.scale",
    "segmentation.scale",
)
"""What a run can go on with changed on purpose: other numbers, but the same parameters, states and order of samples."""


@dataclass(frozen=True)
class Change:
    """A key of the recipe, with its values before and now."""

    path: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.path} ({_shown(self.then)} then, {_shown(self.now)} now)"


def require_same_recipe(recipe: Recipe, before: Recipe, run_dir: Path, change: bool = False) -> list[Change]:
    """What `recipe` changes in the run of the recipe `before`; nothing unless that is wanted.

    Args:
        change: whether what can be changed on purpose may differ.

    Raises:
        UsageError: `recipe` would compute something else than the one that the run directory holds.
    """
    found = _changes(recipe, before)
    fixed = [each for each in found if not _any(each.path, _CHANGEABLE)]
    if found and (fixed or not change):
        shown = fixed or found
        go_on = "" if fixed else "--change goes on with it changed; else "
        raise UsageError(
            f"run_dir={run_dir} belongs to another recipe: {', '.join(map(str, shown[:3]))}"
            f"{f' and {len(shown) - 3} more' if len(shown) > 3 else ''}; {go_on}set what differs as it was, or name "
            "another run_dir"
        )
    return found


def _changes(recipe: Recipe, before: Recipe) -> list[Change]:
    then, now = dict(_leaves(before)), dict(_leaves(recipe))
    paths = [*then, *(path for path in now if path not in then)]
    return [
        Change(path, then.get(path), now.get(path))
        for path in paths
        if then.get(path) != now.get(path) and not _any(path, _MAY_CHANGE)
    ]


def recipe_id(recipe: Recipe) -> str:
    """Twelve hexadecimal digits, equal for recipes of which each could continue the other's run."""
    fixed = {path: value for path, value in _leaves(recipe) if not _any(path, _MAY_CHANGE)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]


def _any(path: str, keys: Iterable[str]) -> bool:
    """Whether a path is one of the keys, or lies in a section that is."""
    return any(path == key or path.startswith(f"{key}.") for key in keys)


def _leaves(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    return leaves(recipe.shown())


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
