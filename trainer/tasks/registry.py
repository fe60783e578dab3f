"""Tasks by name, as recipes name them."""

import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
from mixmae.trainer.recipe.loading import parse_recipe, upgrade
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.contract import Task

_BUILT_IN = {
    "detect": "mixmae.trainer.tasks.detect",
    "finetune": "mixmae.trainer.tasks.finetune",
    "linear": "mixmae.trainer.tasks.linear",
    "pretrain": "mixmae.trainer.tasks.pretrain",
    "segment": "mixmae.trainer.tasks.segment",
}
_TASKS: dict[str, type[Task]] = {}
_Class = TypeVar("_Class", bound=type[Task])


def register_task(name: str) -> Callable[[_Class], _Class]:
    """Puts a task on the list, under the name by which recipes know it."""

    def put(task: _Class) -> _Class:
        if _TASKS.get(name, task) is not task:
            raise ValueError(f"task {name!r} is registered already, by {_TASKS[name].__module__}")
        _TASKS[name] = task
        return task

    return put


def task_of(recipe: Recipe) -> Task:
    """The task that a recipe names, with the recipe checked by it; imports the recipe's plugins.

    Raises:
        UsageError: an unknown task, a plugin that cannot be imported, or keys that the task does not have.
    """
    if recipe.plugins and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that nothing in it takes another module's place
    for plugin in recipe.plugins:
        try:
            importlib.import_module(plugin)
        except ImportError as error:
            raise UsageError(
                f"plugins: {plugin!r} cannot be imported ({error}); install it, or add its folder to PYTHONPATH"
            ) from error
    if recipe.task in _BUILT_IN:
        importlib.import_module(_BUILT_IN[recipe.task])
    if recipe.task not in _TASKS:
        known = sorted({*_BUILT_IN, *_TASKS})
        nearest = get_close_matches(recipe.task, known, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise UsageError(f"task={recipe.task!r} is unknown; {hint}known: {', '.join(known)}")
    return _TASKS[recipe.task](recipe)


def stored_recipe(content: dict[str, Any], source: str) -> Recipe:
    """A recipe that a run was started with, perhaps by an older version, as `task_of` checks it.

    Raises:
        UsageError: it has keys that nobody knows any more.
    """
    return task_of(parse_recipe(upgrade(content), source)).recipe


def build_model(recipe: Recipe) -> Trainable:
    """The module that a recipe's task trains, with random weights."""
    return task_of(recipe).build()
