"""The main job, from a recipe that was read to the end of its run."""

import os
from dataclasses import dataclass

from models import MixMAE
from trainer import artifact, distributed, exits
from trainer.checkpoints.layout import newest_checkpoint
from trainer.checkpoints.resume import resume
from trainer.checkpoints.saver import Saver
from trainer.config import Recipe
from trainer.data.admit import admit
from trainer.data.index import ShardIndex, open_index
from trainer.data.stream import Position, Stream, ToDevice, lost_worker, order_of
from trainer.distributed import Ranks
from trainer.engine import build_engine, build_model, deepspeed_config
from trainer.errors import UsageError
from trainer.exporting import check_monitoring
from trainer.heartbeat import Heartbeat
from trainer.loop import fit
from trainer.observe import Observer, start_observer
from trainer.optim import Schedule, build_schedule
from trainer.report import NullReporter, Reporter
from trainer.run import Run
from trainer.run_dir import begin_attempt, check_run_dir, refuse_attempt, replaced_file, restarted, write_run_dir
from trainer.same_run import require_same_recipe
from trainer.sample_log import SampleLog
from trainer.signals import StopRequest
from trainer.state import TrainState
from trainer.tracking import Tracker, check_wandb, prepare_wandb, wandb_in_words

_LAST_SAVE = 10.0
"""Seconds that a run which failed waits for a save that it began before."""


@dataclass(frozen=True)
class Job:
    """A recipe that was checked: its shards, schedule and untrained model."""

    recipe: Recipe
    index: ShardIndex
    schedule: Schedule
    model: MixMAE
    data_note: str | None
    """What of the data will be stepped over."""


def pretrain(recipe: Recipe, ranks: Ranks, stop: StopRequest | None = None, heartbeat: Heartbeat | None = None) -> int:
    """Trains a recipe from its newest checkpoint, if there is one, to its end or until it is asked to stop.

    Returns:
        The exit code, `exits.FINISHED` or `exits.PREEMPTED`.

    Raises:
        UsageError: whatever in the recipe, the shards or the run directory does not fit; most of it is found before the
            process group is joined and a GPU touched.
    """
    job = check(recipe, ranks)
    distributed.join(ranks)
    run = prepare(job, ranks, stop, heartbeat)
    clean = False
    try:
        asked_by = fit(run)
        say_end(run, asked_by)
        clean = True
    except Exception as error:
        lost = lost_worker(error, ranks.rank)
        run.reporter.event("failed", f"step {run.state.step}: {lost or error}", step=run.state.step)
        if lost is not None:
            raise lost from error
        raise
    finally:
        run.saver.wait(_LAST_SAVE)
        if run.sample_log is not None:
            run.sample_log.close()
        run.observer.close(clean)
        run.batches.close()
        run.reporter.close()
        run.engine.destroy()
    return exits.FINISHED if asked_by is None else exits.PREEMPTED


def say_end(run: Run, asked_by: str | None) -> None:
    step = run.state.step
    if asked_by is None:
        run.reporter.event("end", f"finished at step {step}: {run.recipe.run_dir}", step=step)
    else:
        message = f"stopped at step {step} by {asked_by}, all saved; the same command goes on from here"
        run.reporter.event("preempted", message, step=step, reason=asked_by)


def check(recipe: Recipe, ranks: Ranks) -> Job:
    """Looks at everything that a user can get wrong; each rank by itself."""
    deepspeed_config(recipe, ranks.world_size)
    recipe.streams_of(ranks.rank, ranks.world_size)
    index = open_index(recipe.data.shards, recipe.data.network, recipe.data.cache)
    order_of(recipe, index)
    note = admit(index, recipe.data.max_bad_share)
    schedule = build_schedule(recipe, len(index))
    check_run_dir(recipe, index)
    check_monitoring(recipe)
    check_wandb(recipe)
    model = build_model(recipe)
    if recipe.model.init is not None and newest_checkpoint(recipe.run_dir) is None:
        artifact.initialise(model, recipe.model.init)
    return Job(recipe, index, schedule, model, note)


def prepare(job: Job, ranks: Ranks, stop: StopRequest | None = None, heartbeat: Heartbeat | None = None) -> Run:
    """Observer, engine, position, batches and reporter: everything up to the first step."""
    observer, silent = start_observer(job.recipe, ranks, heartbeat)  # first, so that a start that hangs is seen
    ends = begin_attempt(job.recipe.run_dir) if ranks.is_main else []
    observer.restarted(ends)
    try:
        return _build(job, ranks, stop, observer, silent, ends)
    except UsageError as error:
        if ranks.is_main:
            refuse_attempt(job.recipe.run_dir, str(error))
        observer.close(clean=True)  # there is no run: nothing to be missed
        raise


def _build(
    job: Job, ranks: Ranks, stop: StopRequest | None, observer: Observer, silent: str | None, ends: list[str]
) -> Run:
    recipe, index, schedule, model = job.recipe, job.index, job.schedule, job.model
    parameters = sum(p.numel() for p in model.parameters())
    prepare_wandb(recipe, ranks)
    with wandb_in_words(recipe):
        engine = build_engine(model, recipe, ranks)
    resumed = resume(engine, recipe.run_dir, ranks)
    state, position = TrainState(), Position(recipe.seed, 0, index.fingerprint)
    if resumed is not None:
        require_same_recipe(recipe, dict(resumed.manifest.recipe), recipe.run_dir)
        state, position = TrainState.from_state_dict(resumed.manifest.state), Position(**resumed.manifest.position)
    position.require(recipe.seed, index)
    if ranks.is_main:
        write_run_dir(recipe, index)
    tracker = Tracker.of(engine)
    main = ranks.is_main
    reporter = Reporter(recipe.run_dir, state.step, schedule.total_steps, tracker) if main else NullReporter()
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
    for note in resumed.notes if resumed is not None else ():
        reporter.event("fallback", f"{note}; going on from step {state.step}", step=state.step)
    if ranks.is_main:
        observer.begin(schedule.total_steps, parameters)
    to_device = ToDevice(ranks.device, recipe.data.mean, recipe.data.std)
    if job.data_note is not None:
        reporter.event("data", job.data_note, step=state.step)
    batches = Stream(recipe, ranks, index, position, replaced_file(recipe.run_dir, ranks.rank))
    saver = Saver(engine, recipe.run_dir, recipe.checkpoint, ranks, begun=state.step if resumed else None)
    run = Run(recipe, ranks, engine, index, schedule, state, batches, to_device, reporter, observer, saver, stop)
    if recipe.log.samples:
        run.sample_log = SampleLog(recipe.run_dir, ranks)
    return run
