"""Skips steps whose loss or gradient is not finite (NaN, inf); clips gradients where DeepSpeed does not (stage 0)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def refuse_non_finite(loss: Tensor) -> Tensor:
    """The loss; where it is not finite its gradient is not either, so the optimizers' shared check skips the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


class Guarded(torch.optim.Optimizer):
    """Mixin: an optimizer that measures and clips the gradient, and skips a step whose gradient is not finite.

    DeepSpeed's ZeRO optimizers do this, its stage 0 does not. The attributes are those by which its engine learns of a
    skipped step and of the norm.
    """

    def __init__(self, params: Any, *, clip_grad: float | None, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.clip_grad = clip_grad
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return None
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        return super().step()


def guarded(optimizer: type[torch.optim.Optimizer]) -> type[Guarded]:
    """That class of optimizers, guarded."""
    return type(f"Guarded{optimizer.__name__}", (Guarded, optimizer), {})
