"""Whether a recipe continues the run that a directory holds: what may change, and what would compute something else."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import RECIPE
from mixmae.trainer.recipe.loading import parse_recipe
from mixmae.trainer.recipe.schema import Recipe, Section

_MAY_CHANGE = (
    "run_dir",
    "data.shards",
    "data.num_workers",
    "data.prefetch_factor",
    "data.max_bad_share",
    "data.network",
    "data.cache",
    "train.compile",
    "train.fused_attention",
    "train.zero_stage",
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.max_skipped_steps",
    "model.init",
    "checkpoint",
    "launch",
    "log",
    "monitoring",
)
"""None of these changes what is computed but for rounding; micro_batch also which images of a batch are mixed."""


def require_same_recipe(recipe: Recipe, earlier: dict[str, Any], run_dir: Path) -> None:
    """Raises UsageError if `recipe` would compute something else than the run directory's own."""
    before = parse_recipe(earlier, str(run_dir / RECIPE))
    differences = [d for d in _differences(before, recipe) if not any(d[0].startswith(free) for free in _MAY_CHANGE)]
    if differences:
        shown = ", ".join(f"{path} ({then} then, {now} now)" for path, then, now in differences[:3])
        raise UsageError(
            f"run_dir={run_dir} belongs to another recipe: {shown}; set what differs as it was, or name another run_dir"
        )


def recipe_id(recipe: Recipe) -> str:
    """Twelve hexadecimal digits, equal for recipes of which each could continue the other's run."""
    content = recipe.model_dump(mode="json")
    for path in _MAY_CHANGE:
        section, _, key = path.rpartition(".")
        (content[section] if section else content).pop(key)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _differences(before: Section, now: Section, prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for name in type(now).model_fields:
        a, b = getattr(before, name), getattr(now, name)
        if isinstance(b, Section):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append((prefix + name, a, b))
    return found
