"""The end of a run: what is said of it, and everything that it started is ended."""

import logging
from contextlib import ExitStack

from mixmae.base.errors import describe_error
from mixmae.trainer.run.context import Run
from mixmae.trainer.run.saving import TakenOverError

_logger = logging.getLogger(__name__)
_LAST_SAVE = 10.0
"""Seconds that a run which failed waits for a save that it began before."""


def close(run: Run, clean: bool) -> None:
    """Ends all that a run started, the last first; what cannot be ended keeps nothing else."""
    with ExitStack() as started:
        started.callback(run.engine.destroy)
        started.callback(run.reporter.close)
        started.callback(run.batches.close)
        started.callback(run.observer.close, clean)
        if run.sample_log is not None:
            started.callback(run.sample_log.close)
        started.callback(run.saver.wait, _LAST_SAVE)


def fail(run: Run, error: BaseException) -> None:
    """Records why a run failed, and ends all that it started; what goes wrong meanwhile does not hide the reason."""
    ending = ExitStack()
    ending.callback(close, run, clean=False)
    step, kind = run.state.step, "superseded" if isinstance(error, TakenOverError) else "failed"
    ending.callback(run.reporter.event, kind, f"step {step}: {describe_error(error)}", step=step)
    end_all(ending)


def end_all(started: ExitStack) -> None:
    """For a run that has failed: what goes wrong while it ends does not hide the reason."""
    try:
        started.close()
    except Exception as error:
        _logger.warning("while the run ended: %s", describe_error(error))


def say_end(run: Run, asked_by: str | None, begun: int) -> None:
    step, run_dir = run.state.step, run.recipe.run_dir
    if asked_by is None and begun == step:
        longer = f"the same command with --change and a longer train.duration than {run.recipe.train.duration}"
        message = f"already finished at step {step}; next: mixmae export {run_dir} ENCODER_DIR, or to go on, {longer}"
        run.reporter.event("end", message, step=step)
    elif asked_by is None:
        run.reporter.event("end", f"finished at step {step}: {run_dir}", step=step)
    else:
        message = f"stopped at step {step} by {asked_by}, all saved; the same command goes on from here"
        run.reporter.event("preempted", message, step=step, reason=asked_by)
