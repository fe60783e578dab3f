"""From a checked recipe to a run at its first step, or at the step that its newest checkpoint left."""

import os
from contextlib import ExitStack

from mixmae.base.errors import UsageError, describe_error
from mixmae.base.heartbeat import Heartbeat
from mixmae.base.signals import StopRequest
from mixmae.base.software import versions
from mixmae.trainer.checkpoints.resume import Resumed, resume, stored_state
from mixmae.trainer.checkpoints.saver import Saver
from mixmae.trainer.checkpoints.slices import ModelSlices
from mixmae.trainer.data.joined_index import describe_shares
from mixmae.trainer.data.stream import Position, Stream
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine.cpu import Bf16Matmuls, faster_matmuls, matmuls_of
from mixmae.trainer.engine.deepspeed_engine import build_engine
from mixmae.trainer.engine.distributed import Ranks, from_main
from mixmae.trainer.engine.ema import Ema
from mixmae.trainer.recipe.resume_rules import Change, require_same_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import Job
from mixmae.trainer.run.context import Run
from mixmae.trainer.run.ending import end_all
from mixmae.trainer.run.provenance import replaced_file, write_run_dir
from mixmae.trainer.run.state import TrainState
from mixmae.trainer.tasks.registry import stored_recipe
from mixmae.trainer.telemetry.events import begin_attempt, fail_attempt, record_changes, refuse_attempt, restarted
from mixmae.trainer.telemetry.observer import Observer, start_observer
from mixmae.trainer.telemetry.reporter import NullReporter, Reporter
from mixmae.trainer.telemetry.sample_log import SampleLog
from mixmae.trainer.telemetry.wandb_tracker import Tracker, explain_wandb_errors, prepare_wandb


def prepare(job: Job, ranks: Ranks, stop: StopRequest | None = None, heartbeat: Heartbeat | None = None) -> Run:
    """Observer, engine, position, batches and reporter: everything up to the first step."""
    observer, silent = start_observer(job.recipe, ranks, heartbeat)  # first, so that a start that hangs is seen
    started = ExitStack()
    try:
        ends = begin_attempt(job.recipe.run_dir) if ranks.is_main else []
        observer.restarted(ends)
        return _build(job, ranks, stop, observer, silent, ends, started)
    except BaseException as error:
        refused = isinstance(error, UsageError)
        started.callback(observer.close, clean=refused)  # then there is no run: nothing to be missed
        if ranks.is_main:
            record = refuse_attempt if refused else fail_attempt
            started.callback(record, job.recipe.run_dir, describe_error(error))
        end_all(started)
        raise


def _build(
    job: Job,
    ranks: Ranks,
    stop: StopRequest | None,
    observer: Observer,
    silent: str | None,
    ends: list[str],
    started: ExitStack,
) -> Run:
    """What `prepare` returns; `started` ends what is there so far."""
    recipe, index, schedule = job.recipe, job.index, job.schedule
    prepare_wandb(recipe, ranks)
    matmuls = _matmuls(recipe, ranks)
    with explain_wandb_errors(recipe):
        scale_of = job.task.lr_scale_of(job.model)
        engine = build_engine(job.model, recipe, ranks, job.task.optimizer(), scale_of, matmuls)
    started.callback(engine.destroy)
    ema = None if recipe.optim.ema_decay is None else Ema(ModelSlices(engine), recipe.optim.ema_decay)
    resumed = resume(engine, recipe.run_dir, ranks, ema)
    state, position, changes = _state_of(resumed, job)
    state.bf16_matmuls = matmuls or ""
    tracker = Tracker.of(engine)
    if ranks.is_main:
        if changes:
            record_changes(recipe.run_dir, state.step, changes)
        write_run_dir(recipe, index)
        observer.begin(schedule.total_steps, job.parameters, state.step)
    job.task.prepare(engine.module, index, ranks, lambda: observer.set_phase("starting"))
    main = ranks.is_main
    transform = job.task.transform(index)
    batches = Stream(recipe, ranks, index, position, replaced_file(recipe.run_dir, ranks.rank), transform)
    started.callback(batches.close)
    # After the loader's workers are forked: with memory that they shared, the first save would copy each page on write.
    saver = Saver(engine, recipe, versions(), ranks, begun=state.step if resumed else None, ema=ema)
    reporter = Reporter(recipe.run_dir, state.step, schedule.total_steps, tracker) if main else NullReporter()
    started.callback(reporter.close)
    sample_log = SampleLog(recipe.run_dir, ranks) if recipe.log.samples else None
    if sample_log is not None:
        started.callback(sample_log.close)
    run = Run(
        recipe=recipe,
        ranks=ranks,
        task=job.task,
        engine=engine,
        index=index,
        schedule=schedule,
        state=state,
        batches=batches,
        to_device=ToDevice.of(ranks.device, recipe.data),
        reporter=reporter,
        observer=observer,
        saver=saver,
        ema=ema,
        stop=stop,
        sample_log=sample_log,
    )
    _say_start(run, job, resumed, ends)
    if silent is not None:
        run.reporter.event("monitoring", silent)
    return run


def _matmuls(recipe: Recipe, ranks: Ranks) -> Bf16Matmuls | None:
    """How a bf16 model multiplies on CPUs: on every rank and after every resume as on the main rank at first."""
    if recipe.train.precision != "bf16" or ranks.device.type != "cpu":
        return None
    if not ranks.is_main:
        return from_main(None)
    stored = stored_state(recipe.run_dir)
    return from_main(faster_matmuls() if stored is None else matmuls_of(stored.get("bf16_matmuls", "")))


def _state_of(resumed: Resumed | None, job: Job) -> tuple[TrainState, Position, list[Change]]:
    """Where the run stands, at its beginning or where a checkpoint left it, and what its recipe changes from there."""
    recipe, index = job.recipe, job.index
    if resumed is None:
        return TrainState(), Position(recipe.seed, 0, index.fingerprint), []
    before = stored_recipe(dict(resumed.manifest.recipe), str(resumed.folder))
    known = job.changes is not None  # since the checkpoint the recipe may have been changed on purpose
    changes = require_same_recipe(recipe, before, recipe.run_dir, job.change or known)
    try:
        position, state = Position(**resumed.manifest.position), TrainState.from_state_dict(resumed.manifest.state)
    except TypeError as error:
        raise UsageError(
            f"{resumed.folder} counts what this version of mixmae does not; resume the run with the version that saved "
            "it"
        ) from error
    position.require(recipe.seed, index)
    total_steps = job.schedule.total_steps
    if state.step > total_steps:
        raise UsageError(
            f"train.duration={recipe.train.duration} ends at step {total_steps}, and the run has come to step "
            f"{state.step}; set a longer one, or remove the checkpoints after step {total_steps}"
        )
    return state, position, changes if job.changes is None else job.changes


def _say_start(run: Run, job: Job, resumed: Resumed | None, ends: list[str]) -> None:
    """Tells what runs and from where, and what was found to be otherwise than expected."""
    recipe, step, total_steps = run.recipe, run.state.step, run.schedule.total_steps
    run.reporter.event(
        "resumed" if resumed else "start",
        f"{job.task.describe()}, {job.parameters / 1e6:.1f} M parameters, {len(run.index)} images, "
        f"steps {step} to {total_steps} of {recipe.train.global_batch} images on {run.ranks.world_size} "
        f"{run.ranks.device.type} ranks, ZeRO {recipe.train.stage}, {recipe.train.precision}, "
        f"{'compiled, ' if recipe.train.compile else ''}optimizer {type(run.engine.optimizer).__name__}",
        step=step,
        world_size=run.ranks.world_size,
        parameters=job.parameters,
        total_steps=total_steps,
        **restarted(ends, os.environ),
    )
    for share in describe_shares(run.index):
        run.reporter.event("shards", share, step=step)
    for note in resumed.notes if resumed is not None else ():
        run.reporter.event("fallback", f"{note}; going on from step {step}", step=step)
    if job.data_note is not None:
        run.reporter.event("data", job.data_note, step=step)
