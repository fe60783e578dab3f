"""What a task directory's config.json says: the parts of the recipe from which a detector or segmenter was built."""

import json
from pathlib import Path
from typing import Any

from mixmae.trainer.export.encoder_directory import CONFIG
from mixmae.trainer.recipe.loading import upgrade

RECIPE = "recipe"


def task_recipe(directory: Path) -> dict[str, Any] | None:
    """The recipe in a task directory, in today's form; None where the directory is none."""
    try:
        return upgrade(json.loads((directory / CONFIG).read_bytes())[RECIPE])
    except (OSError, ValueError, TypeError, KeyError):
        return None
