"""When the training loop saves a checkpoint, how it reports saves, and how it ends."""

import math

from mixmae.base.errors import UsageError
from mixmae.trainer.checkpoints.manifest import Progress
from mixmae.trainer.checkpoints.saver import Saved
from mixmae.trainer.engine.distributed import all_gather, from_main
from mixmae.trainer.run.context import Run
from mixmae.trainer.run.stop_signal import StopSignal


class SaveError(UsageError):
    """Checkpoints can no longer be saved: the storage failed, not the call."""

    exit_code = 1


class TakenOverError(SaveError):
    """A later start has the run: this one ended, the run did not."""


def save(run: Run) -> None:
    """Begins a save; where it is not asynchronous, also ends it."""
    state = run.state
    metrics = {name: value for name, value in run.metrics.items() if math.isfinite(value)}
    progress = Progress(state.step, run.epoch, run.loss, state.state_dict(), vars(run.position), metrics)
    run.saver.save(progress)


def report_saves(run: Run) -> None:
    """Reports a save that has ended, if one has; only the main rank knows."""
    saved = run.saver.poll()
    if saved is not None and run.ranks.is_main:
        _report_save(run, saved)


def _report_save(run: Run, saved: Saved) -> None:
    if saved.folder is None:
        run.observer.checkpoint_failed()
        run.reporter.event(
            "checkpoint_failed",
            f"step {saved.step} could not be saved ({run.saver.failures} in a row): {saved.error}; older checkpoints "
            "are as they were",
            step=saved.step,
            error=saved.error,
        )
        return
    run.observer.checkpoint(saved)
    run.reporter.event(
        "checkpoint",
        f"saved {saved.folder} ({saved.bytes / 1e6:.1f} MB in {saved.seconds:.2f} s; blocked training for "
        f"{saved.stall:.2f} s)",
        step=saved.step,
        folder=str(saved.folder),
        bytes=saved.bytes,
        seconds=saved.seconds,
        stall_seconds=saved.stall,
    )
    if saved.prune_error is not None:
        run.reporter.event(
            "checkpoint_kept",
            f"step {saved.step} is saved, but an older checkpoint could not be removed: {saved.prune_error}; it "
            "goes with the next save or start",
            step=saved.step,
            error=saved.prune_error,
        )


def stop_signal(run: Run) -> StopSignal:
    """The stop signal of this rank after a step."""
    if run.ranks.is_main and (run.saver.superseded or run.saver.failures > run.recipe.checkpoint.max_failures):
        return StopSignal.ABORT
    return StopSignal.CONTINUE if _asked_to_stop(run) is None else StopSignal.STOP


def finish(run: Run, signal: StopSignal) -> str | None:
    """Ends a run on all ranks, everything saved; returns what asked it to stop, if anything did.

    Raises:
        SaveError: the run had to give up, or its last state could not be saved.
    """
    if signal is not StopSignal.ABORT and run.saver.begun != run.state.step:
        save(run)
    run.saver.wait()
    report_saves(run)
    told = run.saver.failures, run.saver.error, run.saver.superseded
    failures, error, superseded = from_main(told, tuple[int, str | None, bool])
    if superseded:
        raise TakenOverError(f"the run ends at step {run.state.step}: {error}")
    if error is not None:
        raise SaveError(
            f"the run ends at step {run.state.step}: {failures} saves in a row failed, the last with {error}; make "
            f"room or fix the storage behind run_dir={run.recipe.run_dir}, then start the same command again"
        )
    if run.state.step == run.schedule.total_steps:
        return None
    own = _asked_to_stop(run)
    reasons = all_gather(own and f"{own} on rank {run.ranks.rank}", str | None)
    return next(reason for reason in reasons if reason is not None)


def _asked_to_stop(run: Run) -> str | None:
    return run.stop.reason(run.recipe.checkpoint.stop_before_end) if run.stop is not None else None
