"""Task directories: a detector or segmenter as a whole, from which its task builds it again.

`model.safetensors` has all weights, `config.json` the parts of the recipe that say what was built.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.files import new_directory
from mixmae.models.contract import Trainable
from mixmae.trainer.export.encoder_directory import CARD, CONFIG, ENCODER, misfits, own_weights, read_weights
from mixmae.trainer.export.task_config import RECIPE, task_recipe
from mixmae.trainer.recipe.loading import parse_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.contract import Task
from mixmae.trainer.tasks.registry import task_of

_SECTIONS = ("task", "plugins", "encoder", "classification", "detection", "segmentation")
_OF_DATA = ("mean", "std", "scale", "nodata")
_TRAINING_ONLY = ("init", "drop_rate", "drop_path_rate")


def write_task_directory(
    out: Path, recipe: Recipe, weights: dict[str, Tensor], facts: dict[str, Any] | None = None, card: str | None = None
) -> None:
    """Writes a task directory; it appears under its name only when complete.

    Args:
        recipe: resolved by its task.
        weights: of all parameters and buffers of the module, by name.
        facts: whatever else config.json should say of where the weights come from.
        card: the model card, in Markdown.

    Raises:
        UsageError: `out` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; name a directory that does not, or remove it")
    with new_directory(out) as partial:
        (partial / CONFIG).write_text(json.dumps({RECIPE: _built_from(recipe), **(facts or {})}, indent=2) + "\n")
        if card is not None:
            (partial / CARD).write_text(card)
        save_file({name: value.cpu().contiguous() for name, value in weights.items()}, partial / ENCODER)
        shutil.copymode(partial / CONFIG, partial / ENCODER)  # safetensors writes for the owner alone


def _built_from(recipe: Recipe) -> dict[str, Any]:
    content = recipe.model_dump(mode="json")
    found = {name: content[name] for name in _SECTIONS if name in content and content[name] != _defaults(recipe, name)}
    found["encoder"] = {key: value for key, value in content["encoder"].items() if key not in _TRAINING_ONLY}
    return {**found, "data": {key: content["data"][key] for key in _OF_DATA}}


def _defaults(recipe: Recipe, section: str) -> Any:
    return type(recipe)().model_dump(mode="json")[section]


def open_task_directory(directory: Path, device: torch.device) -> tuple[Task, Trainable]:
    """The task, and its module with the directory's weights in eval mode on the device.

    Raises:
        UsageError: weights that cannot be read, or are not those of the config.json.
    """
    file, recipe = directory / CONFIG, task_recipe(directory)
    assert recipe is not None, "a task directory"
    task = task_of(parse_recipe(recipe, str(file)))
    module, weights = task.build(), read_weights(directory / ENCODER)
    expected = own_weights(module)
    if wrong := misfits(weights, expected):
        raise UsageError(
            f"{directory}: config.json and weights do not fit: {len(wrong)} are missing, foreign or of another shape, "
            f"the first is {wrong[0]!r}; export it again"
        )
    module.load_state_dict(weights, strict=False)
    return task, module.eval().to(device)
