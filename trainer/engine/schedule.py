"""The learning-rate schedule: base_lr scaled with the global batch, linear warm-up, then one of three decays.

- `cosine`: from the end of the warm-up to `min_lr`;
- `poly`: (1 - step / steps) ^ power, counted from the first step, as mmsegmentation's recipes have it;
- `step`: times gamma from each milestone on, as detectron2's and SimMIM's recipes have it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.optim import Optim

Decay = Callable[[int], float]
"""What is left of the range from `min_lr` to the peak after so many steps, 1 to 0."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 times the decay. Steps count from 0."""

    peak_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int
    decay: Decay

    def lr(self, step: int) -> float:
        warmed = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return warmed * (self.min_lr + (self.peak_lr - self.min_lr) * self.decay(step))


def cosine(warmup: int, total: int) -> Decay:
    def decay(step: int) -> float:
        progress = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))

    return decay


def poly(total: int, power: float) -> Decay:
    return lambda step: (1 - min(1.0, step / total)) ** power


def steps(total: int, milestones: Sequence[float], gamma: float) -> Decay:
    """
    Args:
        milestones: in ascending order, as shares of `total`.
    """
    at = [round(milestone * total) for milestone in milestones]
    return lambda step: gamma ** bisect_right(at, step)


def build_schedule(recipe: Recipe, epoch_samples: int) -> Schedule:
    """The run's schedule, durations turned into steps.

    Raises:
        UsageError: no steps at all, or a warm-up as long as the run.
    """
    global_batch, optim = recipe.train.global_batch, recipe.optim
    total = recipe.train.duration.steps(epoch_samples, global_batch)
    warmup = optim.warmup.steps(epoch_samples, global_batch)
    if total < 1:
        raise UsageError(
            f"train.duration={recipe.train.duration} is less than one step of {global_batch} images "
            f"({epoch_samples} in an epoch); lengthen it or lower train.global_batch"
        )
    if warmup >= total:
        raise UsageError(
            f"optim.warmup={optim.warmup} ({warmup} steps) is not shorter than train.duration="
            f"{recipe.train.duration} ({total} steps); shorten it"
        )
    return Schedule(optim.base_lr * global_batch / 256, optim.min_lr, warmup, total, _decay(optim, warmup, total))


def _decay(optim: Optim, warmup: int, total: int) -> Decay:
    if optim.schedule == "poly":
        return poly(total, optim.poly_power)
    if optim.schedule == "step":
        return steps(total, optim.milestones, optim.gamma)
    return cosine(warmup, total)
