"""What the loop logs: figures of the last steps, skipped steps, and why a run is given up."""

import math
from collections import Counter

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.trainer.data.faults import Reason, too_many
from mixmae.trainer.engine.distributed import all_gather, all_reduce_sum, peak_memory
from mixmae.trainer.run.context import Run
from mixmae.trainer.telemetry.throughput import Throughput


class DivergedError(UsageError):
    """Too many steps in a row without a finite loss and gradient: the run failed, not the call."""

    exit_code = 1


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
    gathered = all_gather(own, tuple[dict[str, int], dict[Reason, int]])
    shards: Counter[str] = sum((Counter(of_shard) for of_shard, _ in gathered), Counter())
    reasons: Counter[Reason] = sum((Counter(of_reason) for _, of_reason in gathered), Counter())
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
    gathered = all_gather((suspects, everything), tuple[list[int], list[int]])
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
