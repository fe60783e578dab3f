"""`mixmae evaluate DIR SHARDS` of a detector or segmenter: what its task measures, as a table."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation.coco_results import ResultFile
from mixmae.trainer.export.task_directory import open_task_directory
from mixmae.trainer.recipe.sections.evaluate import Evaluate
from mixmae.trainer.tasks.contract import Task
from mixmae.trainer.tasks.registry import task_of


def open_for(directory: Path, shards: str, batch: int, threads: int, ranks: Ranks) -> tuple[Task, Trainable]:
    """A task directory's task, which evaluates on these shards, and its module.

    Args:
        batch: images at once on each rank.
        threads: that decode on each rank.

    Raises:
        UsageError: the directory cannot be opened, or the shards are not what its task needs.
    """
    task, module = open_task_directory(directory, ranks.device)
    recipe = task.recipe
    own = {
        "evaluate": Evaluate(shards=shards),
        "data": recipe.data.model_copy(update={"num_workers": threads}),
        "train": recipe.train.model_copy(update={"micro_batch": batch}),
    }
    task = task_of(recipe.model_copy(update=own))
    index = task.open_shards(shards)
    task.check_held_out(index, "SHARDS")
    index.store.close()
    return task, module


def result_file(task: Task, file: Path) -> ResultFile:
    """The file for what is found in the images that the task evaluates on.

    Raises:
        UsageError: the task finds no objects, or the shards do not keep the ids that name images in such a file.
    """
    assert task.recipe.evaluate.shards is not None
    if not task.finds_objects:
        raise UsageError(f"--results {file}: {task.describe()} finds no objects; leave it out")
    index = task.open_shards(task.recipe.evaluate.shards)
    found = ResultFile.of_shards(file, index)
    index.store.close()
    return found


@torch.no_grad()
def measure(
    task: Task, module: Trainable, ranks: Ranks, beat: Callable[[], None], file: ResultFile | None = None
) -> dict[str, float]:
    """What the task measures; all ranks call it together.

    Args:
        file: for what is found.
    """
    found = task.evaluate(module, ranks, beat) if file is None else task.evaluate_to(file, module, ranks, beat)
    if not found:
        raise UsageError("nothing could be measured: the shards hold nothing to be found")
    return found


def table(found: Mapping[str, float]) -> list[str]:
    """Lines: a figure each, then a row for each class with its figures, which are named FIGURE/CLASS."""
    whole = {name: value for name, value in found.items() if "/" not in name}
    width = max((len(name) for name in whole), default=0)
    lines = [f"{name:{width}}  {value:7.2%}" for name, value in whole.items()]
    by_class: dict[str, dict[str, float]] = {}
    for name, value in found.items():
        figure, slash, of_class = name.partition("/")
        if slash:
            by_class.setdefault(of_class, {})[figure] = value
    columns = list(dict.fromkeys(figure for row in by_class.values() for figure in row))
    if by_class:
        lines.append("  ".join(f"{column:>8}" for column in columns) + "  class")
    for of_class, row in by_class.items():
        cells = [f"{row[column]:8.2%}" if column in row else " " * 8 for column in columns]
        lines.append("  ".join(cells) + f"  {of_class}")
    return lines
