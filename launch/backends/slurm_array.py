"""Slurm array jobs: one recipe, many tasks, each with its own values and run directory."""

import re
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe

TASK = "{task}"
"""In a value on the command line: the number of the array task."""
_PART = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")
_MOST = 100_000


def parse_array(array: str) -> list[int]:
    """The task numbers of `--array`, such as `0-15%4`, `1,3,5-9:2`.

    Raises:
        UsageError: another form.
    """
    listed, percent, at_once = array.partition("%")
    parts = [_PART.fullmatch(part) for part in listed.split(",")]
    if not all(parts) or (percent and not at_once.isdecimal()):
        raise UsageError(f"--array {array}: expected numbers and ranges, such as 0-15, 0-15%4 or 1,3,5-9:2")
    found: set[int] = set()
    for match in filter(None, parts):
        first, last = int(match[1]), int(match[2] or match[1])
        numbers = range(first, last + 1, int(match[3] or 1) or 1)
        if not 0 < len(numbers) <= _MOST:
            raise UsageError(f"--array {array}: {match[0]} is empty or too long; expected such as 0-15")
        found.update(numbers)
    return sorted(found)


def load_array(file: Path, overrides: Sequence[str], array: str) -> tuple[list[Recipe], Path]:
    """The recipes of an array's tasks, and their run directory with `{task}` where tasks differ.

    Raises:
        UsageError: any task's recipe is wrong, or two tasks would write into one run directory.
    """
    numbers = parse_array(array)
    recipes = [load_recipe(file, [text.replace(TASK, str(task)) for text in overrides]) for task in numbers]
    owners: dict[Path, int] = {}
    for task, recipe in zip(numbers, recipes, strict=True):
        other = owners.setdefault(recipe.run_dir, task)
        if other != task:
            raise UsageError(
                f"--array {array}: tasks {other} and {task} would share run_dir={recipe.run_dir}; put {TASK} into it, "
                f"such as run_dir={recipe.run_dir}-{TASK}"
            )
    named = [text.removeprefix("run_dir=") for text in overrides if text.startswith("run_dir=")]
    run_dir = Path(named[-1]) if named else recipes[0].run_dir
    if str(run_dir).replace(TASK, str(numbers[0])) != str(recipes[0].run_dir):
        raise UsageError(f"run_dir={run_dir}: expected a plain path with --array, without quotes of YAML")
    return recipes, run_dir
