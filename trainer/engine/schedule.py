"""The learning-rate schedule: base_lr scaled with the global batch, linear warm-up, cosine decay."""

import math
from dataclasses import dataclass

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.schema import Recipe


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then cosine to `min_lr` (paper appendix A.1). Steps count from 0."""

    peak_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_schedule(recipe: Recipe, epoch_samples: int) -> Schedule:
    """The run's schedule, durations turned into steps.

    Raises:
        UsageError: no steps at all, or a warm-up as long as the run.
    """
    global_batch = recipe.train.global_batch
    total = recipe.train.duration.steps(epoch_samples, global_batch)
    warmup = recipe.optim.warmup.steps(epoch_samples, global_batch)
    if total < 1:
        raise UsageError(
            f"train.duration={recipe.train.duration} is less than one step of {global_batch} images "
            f"({epoch_samples} in an epoch); lengthen it or lower train.global_batch"
        )
    if warmup >= total:
        raise UsageError(
            f"optim.warmup={recipe.optim.warmup} ({warmup} steps) is not shorter than train.duration="
            f"{recipe.train.duration} ({total} steps); shorten it"
        )
    return Schedule(recipe.optim.base_lr * global_batch / 256, recipe.optim.min_lr, warmup, total)
