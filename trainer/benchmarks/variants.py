"""The bare step (forward, backward, optimizer) in several ways of computing it: what `mixmae bench step` compares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Literal

import torch
from torch import Tensor

from mixmae.models.contract import Trainable
from mixmae.models.encoders.swin import Stage, Swin
from mixmae.models.methods.contract import Method
from mixmae.trainer.benchmarks.plain import make_plain
from mixmae.trainer.engine.activation_checkpointing import checkpoint_activations
from mixmae.trainer.engine.cpu import apply_cpu_workarounds
from mixmae.trainer.engine.engine import compile_parts
from mixmae.trainer.engine.parameter_groups import exempt_from_decay, optimizer_groups, parameter_groups
from mixmae.trainer.recipe.schema import ActivationCheckpointing, Recipe
from mixmae.trainer.tasks.registry import build_model


def _masked(model: Trainable) -> None:
    assert isinstance(model, Method)
    assert isinstance(model.encoder, Swin)
    for stage in model.encoder.stages:
        stage.forward = MethodType(_without_sorting_by_group, stage)


def _without_sorting_by_group(self: Stage, x: Tensor, groups: Tensor | None, num_groups: int | None) -> Tensor:
    return Stage.forward(self, x, groups, None)


def _recomputing(kind: Literal["selective", "torch"]) -> Callable[[Trainable], object]:
    return partial(checkpoint_activations, settings=ActivationCheckpointing(kind=kind))


def _fused(model: Trainable) -> None:
    model.set_fused_attention()


@dataclass(frozen=True)
class Variant:
    """A way of computing the step.

    Attributes:
        words: for the table.
        change: what it makes of a model.
        autocast: fp32 weights under `torch.autocast` in place of bf16 weights.
        compiled: torch.compile, block by block.
        cuda_only: whether a CPU cannot run it.
    """

    words: str
    change: Callable[[Trainable], object] = lambda model: None
    autocast: bool = False
    compiled: bool = False
    cuda_only: bool = False


VARIANTS = {
    "plain": Variant("as published code computes it, weights in the run's precision", make_plain),
    "plain-autocast": Variant("as published code computes it, fp32 weights under autocast", make_plain, autocast=True),
    "masked": Variant("tokens sorted by window once per stage, groups kept apart by a mask", _masked),
    "grouped": Variant("tokens sorted by group in the global stages: what runs where nothing is compiled"),
    "selective": Variant("grouped, norms and GELU recomputed (kind=selective)", _recomputing("selective")),
    "recomputed": Variant("grouped, each block recomputed (kind=torch)", _recomputing("torch")),
    "compiled": Variant("grouped, each block and the loss compiled (train.compile=true)", compiled=True),
    "triton": Variant("grouped, attention of the global stages in one kernel", _fused, cuda_only=True),
    "compiled-triton": Variant("both", _fused, compiled=True, cuda_only=True),
}


class BareStep:
    """Model and AdamW without DeepSpeed, loop, data or watchers; bf16 weights have fp32 masters, as in a run.

    Args:
        recipe: model, precision and activation checkpointing; weights are a function of its seed.
    """

    def __init__(self, recipe: Recipe, variant: Variant, device: torch.device) -> None:
        self.model = build_model(recipe).to(device)
        checkpoint_activations(self.model, recipe.train.activation_checkpointing)
        variant.change(self.model)
        self._autocast = variant.autocast
        self._device = device
        if recipe.train.precision == "bf16" and not variant.autocast:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.bfloat16()
            if device.type == "cpu":
                apply_cpu_workarounds(self.model)
        if variant.compiled:
            compile_parts(self.model)
        named = list(self.model.named_parameters())
        self._weights = [parameter for _, parameter in named]
        self._masters = [
            torch.nn.Parameter(parameter.detach().float()) if parameter.dtype != torch.float32 else parameter
            for parameter in self._weights
        ]
        masters = {name: master for (name, _), master in zip(named, self._masters, strict=True)}
        groups = parameter_groups(self.model, recipe.optim.weight_decay, exempt_from_decay(recipe, self.model))
        self._optimizer = torch.optim.AdamW(
            optimizer_groups(groups, masters), lr=1e-5, betas=recipe.optim.betas, fused=True
        )

    @property
    def bytes(self) -> int:
        """Of weights, their masters, and AdamW's moments."""
        apart = [m for w, m in zip(self._weights, self._masters, strict=True) if w is not m]
        states = [*self._weights, *apart, *self.model.buffers()]
        return sum(t.numel() * t.element_size() for t in states) + 8 * sum(m.numel() for m in self._masters)

    def loss(self, images: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            loss: Tensor = self.model(images, *inputs)
        return loss

    def __call__(self, images: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """One step; returns its loss, on the device."""
        loss = self.loss(images, inputs)
        loss.backward()
        self._optimize()
        return loss.detach()

    @torch.no_grad()
    def _optimize(self) -> None:
        apart = [(w, m) for w, m in zip(self._weights, self._masters, strict=True) if w is not m]
        for weight, master in apart:
            assert weight.grad is not None
            master.grad = weight.grad.float()
        self._optimizer.step()
        for weight, master in apart:
            weight.copy_(master)
            weight.grad = None
        self._optimizer.zero_grad()
