"""The main job: `python -m trainer.pretrain RECIPE key=value ...`, alone or under deepspeed, torchrun or srun."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.heartbeat import Heartbeat, begin_heartbeat

if __name__ == "__main__":  # before torch is imported, which may take long on a shared file system
    _HEARTBEAT = begin_heartbeat(os.environ)

from models import MixMAE
from trainer import artifact, checkpoint, distributed
from trainer.config import Recipe
from trainer.data.admit import admit
from trainer.data.index import ShardIndex, open_index
from trainer.data.stream import Position, Stream, ToDevice, lost_worker, order_of
from trainer.distributed import Ranks, read_ranks
from trainer.engine import build_engine, build_model, deepspeed_config
from trainer.errors import UsageError, run_in_words
from trainer.exporting import check_monitoring
from trainer.loop import Run, fit
from trainer.observe import Observer, start_observer
from trainer.optim import Schedule, build_schedule
from trainer.recipes import load_recipe
from trainer.report import NullReporter, Reporter
from trainer.run_dir import begin_attempt, check_run_dir, refuse_attempt, replaced_file, restarted, write_run_dir
from trainer.state import TrainState


@dataclass(frozen=True)
class Job:
    """A recipe that was checked: its shards, schedule and untrained model."""

    recipe: Recipe
    index: ShardIndex
    schedule: Schedule
    model: MixMAE
    data_note: str | None
    """What of the data will be stepped over."""


def pretrain(recipe: Recipe, ranks: Ranks, heartbeat: Heartbeat | None = None) -> None:
    """Trains a recipe to its end, from its newest checkpoint if there is one.

    Raises:
        UsageError: whatever in the recipe, the shards or the run directory does not fit; most of it is found before the
            process group is joined and a GPU touched.
    """
    job = check(recipe, ranks)
    distributed.join(ranks)
    run = prepare(job, ranks, heartbeat)
    clean = False
    try:
        fit(run)
        run.observer.at("ending")
        run.reporter.event("end", f"finished at step {run.state.step}: {recipe.run_dir}", step=run.state.step)
        clean = True
    except Exception as error:
        lost = lost_worker(error, ranks.rank)
        run.reporter.event("failed", f"step {run.state.step}: {lost or error}", step=run.state.step)
        if lost is not None:
            raise lost from error
        raise
    finally:
        run.observer.close(clean)
        run.batches.close()
        run.reporter.close()
        run.engine.destroy()


def check(recipe: Recipe, ranks: Ranks) -> Job:
    """Looks at everything that a user can get wrong; each rank by itself."""
    deepspeed_config(recipe, ranks.world_size)
    recipe.streams_of(ranks.rank, ranks.world_size)
    index = open_index(recipe.data.shards, recipe.data.network, recipe.data.cache)
    order_of(recipe, index)
    note = admit(index, recipe.data.max_bad_share)
    schedule = build_schedule(recipe, len(index))
    check_run_dir(recipe, index)
    checkpoint.check_resumable(recipe, ranks)
    check_monitoring(recipe)
    model = build_model(recipe)
    if recipe.model.init is not None and checkpoint.newest_checkpoint(recipe.run_dir) is None:
        artifact.initialise(model, recipe.model.init)
    return Job(recipe, index, schedule, model, note)


def prepare(job: Job, ranks: Ranks, heartbeat: Heartbeat | None = None) -> Run:
    """Observer, engine, position, batches and reporter: everything up to the first step."""
    observer, silent = start_observer(job.recipe, ranks, heartbeat)  # first, so that a start that hangs is seen
    ends = begin_attempt(job.recipe.run_dir) if ranks.is_main else []
    observer.restarted(ends)
    try:
        return _build(job, ranks, observer, silent, ends)
    except UsageError as error:
        if ranks.is_main:
            refuse_attempt(job.recipe.run_dir, str(error))
        observer.close(clean=True)  # there is no run: nothing to be missed
        raise


def _build(job: Job, ranks: Ranks, observer: Observer, silent: str | None, ends: list[str]) -> Run:
    recipe, index, schedule, model = job.recipe, job.index, job.schedule, job.model
    parameters = sum(p.numel() for p in model.parameters())
    engine = build_engine(model, recipe, ranks)
    resumed = checkpoint.resume(engine, recipe, ranks)
    state, position = resumed or (TrainState(), Position(recipe.seed, 0, index.fingerprint))
    position.require(recipe.seed, index)
    if ranks.is_main:
        write_run_dir(recipe, index)
    reporter = Reporter(recipe.run_dir, state.step, schedule.total_steps) if ranks.is_main else NullReporter()
    reporter.event(
        "resumed" if resumed else "start",
        f"{recipe.model.encoder}, {parameters / 1e6:.1f} M parameters with decoder, {len(index)} images, "
        f"steps {state.step} to {schedule.total_steps} of {recipe.train.global_batch} images on {ranks.world_size} "
        f"{ranks.device.type} ranks, ZeRO {recipe.train.zero_stage}, {recipe.train.precision}, "
        f"optimizer {type(engine.optimizer).__name__}",
        step=state.step,
        world_size=ranks.world_size,
        parameters=parameters,
        total_steps=schedule.total_steps,
        **restarted(ends, os.environ),
    )
    if silent is not None:
        reporter.event("monitoring", silent)
    if ranks.is_main:
        observer.begin(schedule.total_steps, parameters)
    to_device = ToDevice(ranks.device, recipe.data.mean, recipe.data.std)
    if job.data_note is not None:
        reporter.event("data", job.data_note, step=state.step)
    batches = Stream(recipe, ranks, index, position, replaced_file(recipe.run_dir, ranks.rank))
    return Run(recipe, ranks, engine, index, schedule, state, batches, to_device, reporter, observer)


def main(argv: Sequence[str], heartbeat: Heartbeat | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainer.pretrain", description=__doc__)
    parser.add_argument("recipe", type=Path, help="YAML file, such as configs/pretrain/swin_base_w14.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, such as train.micro_batch=64"
    )
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # deepspeed's launcher passes it; the environment has it too
    args = parser.parse_args(argv)
    recipe = load_recipe(args.recipe, args.overrides)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    pretrain(recipe, read_ranks(os.environ), heartbeat)
    return 0


if __name__ == "__main__":
    distributed.leave(run_in_words(partial(main, heartbeat=_HEARTBEAT), sys.argv[1:]))
