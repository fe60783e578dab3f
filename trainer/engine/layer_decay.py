"""Layer-wise learning-rate decay: a parameter's rate over the schedule's, by its layer."""

import re
from collections.abc import Callable, Iterable
from typing import Literal

from timm.models import group_parameters

from mixmae.models.contract import TrainableEncoder
from mixmae.models.encoders.contract import Encoder
from mixmae.trainer.recipe.sections.optim import Optim

Rule = Literal["standard", "mixmim", "simmim"]
_TOP = re.compile(r"(?:norm|head)\.")
_BETWEEN_BLOCKS = re.compile(r"stages\.[1-9]\d*\.(?!blocks\.)")
"""Patch merging and the like, which open a stage."""


def lr_scales(module: TrainableEncoder, optim: Optim) -> Callable[[str], float] | None:
    """The scale of each of a module's parameters by the recipe's layer decay; None where all have one rate."""
    if optim.layer_decay == 1:
        return None
    encoder = module.get_submodule(module.encoder_path)
    assert isinstance(encoder, Encoder)
    return layer_decay(encoder, optim.layer_decay, optim.layer_decay_rule, f"{module.encoder_path}.")


def layer_decay(encoder: Encoder, decay: float, rule: Rule, prefix: str) -> Callable[[str], float]:
    """The scale of each parameter of an encoder by its name behind `prefix`; 1 for all else.

    Of n blocks in all, the embedding is layer 0, block i is layer i, what opens a stage is of its first block's layer,
    and layer i has the scale decay ^ (n + 1 - i). Final norm and head are layer n + 1, which is what BEiT does; by the
    rule `mixmim` they are layer n, as in the authors' code (util/lr_decay.py); by `simmim` what opens a stage is of the
    layer before it (SimMIM, optimizer.py).
    """
    layers = _layers(encoder, rule)
    top = 1 + _last_block(layers)
    scales = {prefix + name: decay ** (top - layer) for name, layer in layers.items()}
    return lambda name: scales.get(name, 1.0)


def _layers(encoder: Encoder, rule: Rule) -> dict[str, int]:
    names: dict[str, int] = group_parameters(encoder, encoder.group_matcher(), reverse=True)
    layers = {name: layer for name, layer in names.items() if not _TOP.match(name)}
    if rule == "simmim":
        layers = {name: layer - bool(_BETWEEN_BLOCKS.match(name)) for name, layer in layers.items()}
    top = _last_block(layers) + (0 if rule == "mixmim" else 1)
    return layers | dict.fromkeys(_in_top(names), top)


def _in_top(names: Iterable[str]) -> list[str]:
    return [name for name in names if _TOP.match(name)]


def _last_block(layers: dict[str, int]) -> int:
    return max(layer for name, layer in layers.items() if not _TOP.match(name))
