"""The training loop: train steps, and the logging, evaluation and checkpoints between them."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
from mixmae.trainer.data.faults import Reason, too_many
from mixmae.trainer.data.rng import Purpose, seed_at, torch_at
from mixmae.trainer.data.stream import Batch
from mixmae.trainer.engine.distributed import Ranks, all_reduce_sum, peak_memory
from mixmae.trainer.engine.non_finite import refuse_non_finite
from mixmae.trainer.engine.parameter_groups import set_lr
from mixmae.trainer.recipe.units import Span
from mixmae.trainer.run import saving
from mixmae.trainer.run.context import Run, due
from mixmae.trainer.run.stop_signal import StopSignal
from mixmae.trainer.telemetry import pictures
from mixmae.trainer.telemetry.throughput import Throughput

_PICTURE_ROWS = 4


class DivergedError(UsageError):
    """Too many steps in a row without a finite loss and gradient: the run failed, not the call."""

    exit_code = 1


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
        if recipe.log.pictures is not None and due(run, recipe.log.pictures):
            log_pictures(run, batch)
            meter.restart()
        if measures := due_evaluations(run):
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


def train_step(run: Run) -> tuple[Tensor, list[list[int]], Batch]:
    """One optimizer step; returns losses [accumulation] on the device, their samples, and the last micro-batch."""
    engine, state, clock = run.engine, run.state, run.observer.clock
    set_lr(engine.optimizer, run.schedule.lr(state.step))
    losses, samples = [], []
    for micro_step in range(run.recipe.accumulation(run.ranks.world_size)):
        with clock.phase("data_wait"):
            batch = next(run.batches)
        with clock.phase("forward"):
            images = run.to_device(batch.images)
            inputs = inputs_of(run, batch, micro_step)
            torch.manual_seed(seed_at(Purpose.DROP_PATH, *rng_key(run, micro_step)))
            loss = engine(images, *inputs)
        with clock.phase("backward"):
            engine.backward(refuse_non_finite(loss))
        with clock.phase("optimizer"):
            engine.step()
        losses.append(loss.detach())
        samples.append(batch.samples)
    return torch.stack(losses), samples, batch


def rng_key(run: Run, micro_step: int) -> tuple[int, int, int]:
    """Seed, step, and which micro-batch of the global batch: the key of all randomness in it, whoever computes it."""
    accumulation = run.recipe.accumulation(run.ranks.world_size)
    return run.recipe.seed, run.state.step, run.ranks.rank * accumulation + micro_step


def inputs_of(run: Run, batch: Batch, micro_step: int) -> list[Tensor]:
    """What the module takes beside this rank's images, on its device."""
    generator = torch_at(Purpose.INPUTS, *rng_key(run, micro_step))
    inputs = run.task.inputs(run.engine.module, batch, generator)
    return [tensor.to(run.ranks.device, non_blocking=True) for tensor in inputs]


def report(run: Run, window: Tensor, meter: Throughput) -> None:
    """Reduces and reports what happened since the last report; only here does the loop itself wait for the device."""
    tally, epoch = run.batches.fault_log, run.state.samples // len(run.index)
    data = torch.tensor([tally.total, run.batches.retried, tally.of_epoch(epoch).total()], device=window.device)
    total, count, replaced, retried, of_epoch = all_reduce_sum(torch.cat([window, data])).tolist()
    norm = run.engine.get_global_grad_norm()
    state = run.state
    run.loss = total / count if count else None
    values = {
        "loss": math.nan if run.loss is None else run.loss,
        "lr": run.schedule.lr(state.step - 1),
        "grad_norm": float(norm),
        "epoch": run.epoch,
        "images_per_second": meter.rate(),
        "skipped_steps": state.skipped,
        "replaced_samples": replaced,
        "retried_reads": retried,
        "peak_memory_bytes": peak_memory(run.ranks),
    }
    run.reporter.scalars(state.step, state.samples, values)
    run.observer.process()
    if run.ranks.is_main:
        run.observer.logged(values, state, run.schedule.total_steps)
    meter.restart()
    if of_epoch > run.batches.allowed:
        abort_on_corrupt_data(run, epoch)


def abort_on_corrupt_data(run: Run, epoch: int) -> None:
    """Ends the run on all ranks, naming the shards of which too much could not be used."""
    tally = run.batches.fault_log
    own = tally.of_epoch(epoch), tally.counts
    gathered = [own] * run.ranks.world_size
    dist.all_gather_object(gathered, own)
    shards: Counter[str] = sum((of_shard for of_shard, _ in gathered), Counter())
    reasons: Counter[Reason] = sum((of_reason for _, of_reason in gathered), Counter())
    raise too_many(shards, reasons, epoch, run.batches.allowed)


def report_skipped(run: Run, samples: list[list[int]], losses: Tensor) -> None:
    """Reports a skipped step; after too many in a row, ends the run naming step and samples."""
    state = run.state
    if run.ranks.is_main:
        run.observer.skipped()
    run.reporter.event(
        "skipped",
        f"step {state.step}: loss or gradient not finite, step skipped on all ranks ({state.skipped_in_row} in a row)",
        step=state.step,
    )
    if state.skipped_in_row < run.recipe.train.max_skipped_steps:
        return
    finite = losses.isfinite().tolist()
    suspects = [sample for part, good in zip(samples, finite, strict=True) if not good for sample in part]
    everything = [sample for part in samples for sample in part]
    gathered: list[tuple[list[int], list[int]]] = [([], [])] * run.ranks.world_size
    dist.all_gather_object(gathered, (suspects, everything))
    bad = [sample for part, _ in gathered for sample in part]
    shown = bad or [sample for _, part in gathered for sample in part]
    names = ", ".join(run.index.name_of(sample) for sample in shown[:8]) + (", ..." if len(shown) > 8 else "")
    raise DivergedError(
        f"{state.skipped_in_row} steps in a row up to step {state.step} had no finite loss and gradient "
        f"(train.max_skipped_steps={run.recipe.train.max_skipped_steps}); "
        + (
            f"loss not finite on {len(bad)} samples: "
            if bad
            else f"losses finite, gradient not, on {len(shown)} samples: "
        )
        + f"{names}; lower optim.base_lr or set optim.clip_grad (--change), or look at these images"
    )


Measure = Callable[[Trainable, Ranks], dict[str, float]]


def due_evaluations(run: Run) -> list[Measure]:
    """What the task measures after this step."""
    asked = run.recipe.evaluate
    measures: list[Measure] = []
    if asked.shards is not None and due(run, asked.every):
        measures.append(run.task.evaluate)
    if asked.probe is not None and due(run, asked.probe.every):
        measures.append(run.task.probe)
    return measures


def evaluate(run: Run, measures: Sequence[Measure]) -> None:
    """Evaluates the task on all ranks, with the averaged weights where there are some, and reports its metrics."""
    figures: dict[str, float] = {}
    run.engine.eval()
    with torch.no_grad(), run.ema.applied() if run.ema is not None else nullcontext():
        for measure in measures:
            figures |= measure(run.engine.module, run.ranks)
    run.engine.train()
    run.metrics = {**run.metrics, **figures}
    if run.ranks.is_main:
        run.reporter.evaluation(run.state.step, run.state.samples, figures)
        run.observer.evaluation(figures)


def log_pictures(run: Run, batch: Batch) -> None:
    """Logs pictures of what the model makes of a micro-batch; all ranks compute, the main one draws."""
    images = run.to_device(batch.images)
    run.engine.eval()
    with torch.no_grad():
        columns = run.task.pictures(run.engine.module, images, inputs_of(run, batch, 0), _PICTURE_ROWS)
    run.engine.train()
    if columns and run.ranks.is_main:
        run.reporter.picture(run.state.step, pictures.draw_columns(columns, run.recipe.data))
