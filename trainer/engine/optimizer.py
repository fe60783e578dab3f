"""The optimizer of a run: which one is its task's choice."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mixmae.base.errors import UsageError
from mixmae.trainer.engine.lars import LARS
from mixmae.trainer.engine.non_finite import guarded
from mixmae.trainer.engine.parameter_groups import exempt_from_decay, optimizer_groups, parameter_groups
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.optim import Optim


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer before it has parameters.

    Attributes:
        kind: called with parameter groups, `lr` and the settings.
        elementwise: whether each element's step depends on that element alone, so that ZeRO may split parameters.
    """

    kind: type[torch.optim.Optimizer]
    settings: Mapping[str, Any]
    elementwise: bool = True

    def check(self, zero_stage: int) -> None:
        """Raises UsageError if the optimizer cannot run at a ZeRO stage."""
        if zero_stage > 0 and not self.elementwise:
            raise UsageError(
                f"train.zero_stage={zero_stage} splits parameters among ranks, but {self.kind.__name__} needs "
                "each as a whole; set train.zero_stage=0"
            )


def adamw(optim: Optim) -> OptimizerChoice:
    return OptimizerChoice(torch.optim.AdamW, {"betas": optim.betas, "eps": optim.eps, "fused": True})


def lars() -> OptimizerChoice:
    return OptimizerChoice(LARS, {}, elementwise=False)


def build_optimizer(
    recipe: Recipe,
    model: nn.Module,
    choice: OptimizerChoice | None = None,
    lr_scale_of: Callable[[str], float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a model's trainable parameters; at ZeRO stage 0 guarded, since DeepSpeed does not do that there.

    Args:
        choice: None for AdamW with the recipe's settings.
        lr_scale_of: see `parameter_groups`.

    Raises:
        UsageError: the optimizer cannot run at the recipe's ZeRO stage.
    """
    optim, zero_stage = recipe.optim, recipe.train.stage
    choice = choice or adamw(optim)
    choice.check(zero_stage)
    groups = parameter_groups(model, optim.weight_decay, exempt_from_decay(recipe, model), lr_scale_of)
    parameters = optimizer_groups(groups, dict(model.named_parameters()))
    settings = {"lr": optim.base_lr, **choice.settings}
    if zero_stage == 0:
        return guarded(choice.kind)(parameters, clip_grad=optim.clip_grad, **settings)
    return choice.kind(parameters, **settings)
