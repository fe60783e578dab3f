"""What is checked before a run begins: everything that a user can get wrong."""

from dataclasses import dataclass

from mixmae.base.machine import require_shared_memory, require_writable
from mixmae.base.run_directory import newest_checkpoint
from mixmae.models.contract import Trainable
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.integrity import require_pixels, require_usable
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.stream import sample_order
from mixmae.trainer.engine.auto import fit_here
from mixmae.trainer.engine.deepspeed_engine import deepspeed_config
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.schedule import Schedule, build_schedule
from mixmae.trainer.recipe.resume_rules import Change
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.provenance import check_run_dir
from mixmae.trainer.tasks.contract import Task
from mixmae.trainer.tasks.registry import task_of
from mixmae.trainer.telemetry.exporter_process import check_monitoring
from mixmae.trainer.telemetry.wandb_tracker import check_wandb


@dataclass(frozen=True)
class Job:
    """A recipe that was checked: its shards, schedule and untrained model."""

    recipe: Recipe
    index: ShardIndex
    schedule: Schedule
    task: Task
    model: Trainable
    data_note: str | None
    """What of the data will be stepped over."""
    change: bool
    """Whether the recipe may change what a run that has begun computes."""
    changes: list[Change] | None
    """What it changes; None where only the checkpoint can say."""
    parameters: int
    """Counted before ZeRO takes them apart."""


def check(recipe: Recipe, ranks: Ranks, change: bool = False) -> Job:
    """Looks at everything that a user can get wrong; each rank by itself.

    Args:
        change: whether the recipe may change what a run that has begun computes.
    """
    task = task_of(fit_here(recipe, ranks))
    recipe = task.recipe
    deepspeed_config(recipe, ranks.world_size)
    recipe.streams_of(ranks.rank, ranks.world_size)
    index = open_index(recipe.data.shards, recipe.data.network, recipe.data.cache)
    sample_order(recipe, index)
    note = require_usable(index, recipe.data.max_corrupt_fraction)
    require_pixels(index, recipe.data)
    schedule = build_schedule(recipe, len(index))
    require_shared_memory(recipe.batch_bytes_ahead)
    if ranks.is_main:
        require_writable(recipe.run_dir, "run_dir")
    changes = check_run_dir(recipe, index, change)
    check_monitoring(recipe)
    check_wandb(recipe)
    task.check_data(index)
    model = task.build()
    task.require_batch(model)
    if newest_checkpoint(recipe.run_dir) is None:
        task.initialise(model)
    parameters = sum(p.numel() for p in model.parameters())
    return Job(recipe, index, schedule, task, model, note, change, changes, parameters)
