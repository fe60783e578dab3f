"""Whether a recipe continues the run that a directory holds: what may change, and what would compute something else."""

import hashlib
import json
from collections.abc import Iterator
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
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.max_skipped_steps",
    "encoder.init",
    "plugins",
    "evaluate",
    "checkpoint",
    "launch",
    "log",
    "monitoring",
)
"""None of these changes what is computed but for rounding; micro_batch also which images of a batch are mixed."""


def require_same_recipe(recipe: Recipe, before: Recipe, run_dir: Path) -> None:
    """Raises UsageError if `recipe` would compute something else than the one that the run directory holds."""
    then, now = dict(_leaves(before)), dict(_leaves(recipe))
    differences = [
        f"{path} ({_shown(then.get(path))} then, {_shown(now.get(path))} now)"
        for path in [*then, *(path for path in now if path not in then)]
        if then.get(path) != now.get(path) and not any(_belongs(path, free) for free in _MAY_CHANGE)
    ]
    if differences:
        raise UsageError(
            f"run_dir={run_dir} belongs to another recipe: {', '.join(differences[:3])}; set what differs as it was, "
            "or name another run_dir"
        )


def recipe_id(recipe: Recipe) -> str:
    """Twelve hexadecimal digits, equal for recipes of which each could continue the other's run."""
    fixed = {path: value for path, value in _leaves(recipe) if not any(_belongs(path, free) for free in _MAY_CHANGE)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]


def _belongs(path: str, free: str) -> bool:
    return path == free or path.startswith(f"{free}.")


def _leaves(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    return leaves(recipe.shown())


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
