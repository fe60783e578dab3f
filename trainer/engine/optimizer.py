"""AdamW's parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
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


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, no_decay: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Two groups: with weight decay, and without: 1-D parameters and those with a part of `no_decay` in their name."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (exempt if parameter.ndim <= 1 or any(part in name for part in no_decay) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def exempt_from_decay(recipe: Recipe, model: Trainable) -> tuple[str, ...]:
    """Parts of names that weight decay leaves alone: the recipe's, else what the model says."""
    return tuple(model.no_weight_decay()) if recipe.optim.no_decay is None else recipe.optim.no_decay


def build_optimizer(recipe: Recipe, model: Trainable) -> torch.optim.AdamW:
    """AdamW as the recipe has it; at ZeRO stage 0 the one that guards itself, since DeepSpeed does not."""
    groups = parameter_groups(model.named_parameters(), recipe.optim.weight_decay, exempt_from_decay(recipe, model))
    settings: dict[str, Any] = {
        "lr": recipe.optim.base_lr,
        "betas": recipe.optim.betas,
        "eps": recipe.optim.eps,
        "fused": True,
    }
    if recipe.train.zero_stage == 0:
        return GuardedAdamW(groups, clip_grad=recipe.optim.clip_grad, **settings)
    return torch.optim.AdamW(groups, **settings)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that measures and clips the gradient, and skips a step whose gradient is not finite.

    DeepSpeed's ZeRO optimizers do this, its stage 0 does not; the attributes are those by which its engine learns of a
    skipped step and of the norm.
    """

    def __init__(self, params: Any, clip_grad: float | None, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.clip_grad = clip_grad
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return None
        if self.clip_grad is not None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        return super().step()


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def refuse_non_finite(loss: Tensor) -> Tensor:
    """The loss; where it is not finite its gradient is not either, so the optimizers' shared check skips the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))
