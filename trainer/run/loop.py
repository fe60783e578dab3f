"""The training loop: train steps, and the logging, evaluation and checkpoints between them."""

import torch

from mixmae.trainer.recipe.units import Span
from mixmae.trainer.run import saving
from mixmae.trainer.run.context import Run, due
from mixmae.trainer.run.evaluating import due_evaluations, evaluate, log_pictures
from mixmae.trainer.run.reporting import report, report_skipped
from mixmae.trainer.run.stop_signal import StopSignal
from mixmae.trainer.run.train_step import train_step
from mixmae.trainer.telemetry.throughput import Throughput


def fit(run: Run) -> str | None:
    """Trains from the run's state to the schedule's last step, or until it is asked to stop; then all is saved.

    Returns:
        What asked the run to stop; None at its end.

    Raises:
        DivergedError: `train.max_skipped_steps` steps in a row were skipped.
        SaveError: `checkpoint.max_failures` were exceeded, or the last save failed.
    """
    recipe, state, observer = run.recipe, run.state, run.observer
    per_rank = recipe.train.global_batch // run.ranks.world_size
    meter = Throughput()
    window = torch.zeros(2, device=run.ranks.device)  # sum and number of finite losses since the last report
    signal = StopSignal.CONTINUE
    while state.step < run.schedule.total_steps and signal is StopSignal.CONTINUE:
        losses, samples, batch = train_step(run)
        state.advance(recipe.train.global_batch, run.engine.was_step_applied())
        if run.ema is not None and not state.skipped_in_row:
            run.ema.update(state.step - state.skipped)
        meter.count(recipe.train.global_batch)
        window += torch.stack([losses.nan_to_num(0.0, 0.0, 0.0).sum(), losses.isfinite().sum()])
        if run.sample_log is not None:
            run.sample_log.write(state.step, samples)
        observer.data(run.batches)
        if state.skipped_in_row:
            report_skipped(run, samples, losses)
        if state.step == 1 or due(run, Span(recipe.log.every, "step")):
            with observer.clock.phase("logging"):
                report(run, window, meter)
            window.zero_()
        # The first one at once: a pass without gradients takes kernels of its own, better met now than epochs later.
        if recipe.log.pictures is not None and (state.step == 1 or due(run, recipe.log.pictures)):
            log_pictures(run, batch)
            meter.restart()
        if measures := due_evaluations(run):
            with observer.clock.phase("evaluation"):
                evaluate(run, measures)
            meter.restart()
        if due(run, recipe.checkpoint.every):
            with observer.clock.phase("checkpoint"):
                saving.save(run)
            meter.restart()
        saving.report_saves(run)
        observer.step(state, per_rank)
        signal = run.stop_signals.all_reduce(saving.stop_signal(run))
    observer.set_phase("ending")
    return saving.finish(run, signal)
