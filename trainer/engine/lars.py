"""LARS: gradient descent with momentum whose steps are scaled to the norm of each parameter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """LARS (arXiv 1708.03888) as MAE's linear probe uses it: 1-D parameters have neither trust ratio nor weight decay.

    For the others the step is `lr` times the gradient, decay included, times `trust` |weights| / |gradient|; the ratio
    is 1 where a norm is 0. Norms are those of whole parameters, which ZeRO's flat buffers do not have.

    Args:
        trust: trust coefficient.
    """

    def __init__(
        self, params: Any, lr: float, *, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        update = parameter.grad
        assert update is not None
        if parameter.ndim > 1:
            update = update.add(parameter, alpha=group["weight_decay"])
            ratio = group["trust"] * parameter.norm() / update.norm()
            # One of the norms is 0: the ratio is 0, infinite or NaN.
            update = update * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        parameter.add_(state["momentum_buffer"], alpha=-group["lr"])
