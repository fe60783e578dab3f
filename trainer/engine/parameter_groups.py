"""Parameter groups: which parameters share a learning-rate scale and a weight decay."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mixmae.models.contract import Trainable
from mixmae.trainer.recipe.schema import Recipe


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimizer treats alike.

    Attributes:
        names: of the parameters, in the module's order.
        lr_scale: their learning rate over the schedule's.
    """

    names: tuple[str, ...]
    weight_decay: float
    lr_scale: float = 1.0


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    no_decay: tuple[str, ...] = (),
    lr_scale_of: Callable[[str], float] | None = None,
) -> list[ParameterGroup]:
    """A module's trainable parameters by learning-rate scale and weight decay.

    Groups come in order of their scale, from the lowest; of two with the same scale the one with weight decay first.

    Args:
        weight_decay: of all parameters but the exempt ones, which have none: 1-D parameters, and those with a part of
            `no_decay` in their name.
        lr_scale_of: the scale of a parameter, by its name; None for 1.0 everywhere.
    """
    names: dict[tuple[float, float], list[str]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or any(part in name for part in no_decay)
            scale = 1.0 if lr_scale_of is None else lr_scale_of(name)
            names.setdefault((scale, 0.0 if exempt else weight_decay), []).append(name)
    order = sorted(names, key=lambda key: (key[0], -key[1]))
    return [ParameterGroup(tuple(names[scale, decay]), decay, scale) for scale, decay in order]


def exempt_from_decay(recipe: Recipe, model: nn.Module) -> tuple[str, ...]:
    """Parts of names that weight decay leaves alone: the recipe's, else what the model names."""
    if recipe.optim.no_decay is not None:
        return recipe.optim.no_decay
    return tuple(model.no_weight_decay()) if isinstance(model, Trainable) else ()


def optimizer_groups(groups: Iterable[ParameterGroup], parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The groups as a torch optimizer takes them; `lr_scale` is a key that it keeps for `set_lr`, as ZeRO does."""
    return [
        {
            "params": [parameters[name] for name in group.names],
            "weight_decay": group.weight_decay,
            "lr_scale": group.lr_scale,
        }
        for group in groups
    ]


def set_lr(optimizer: Any, lr: float) -> None:
    """Sets the schedule's learning rate, times each group's scale; `optimizer` is torch's or one of DeepSpeed's."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
