"""Variants of the bare step (forward, backward, optimizer) that `mixmae bench step` compares."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MethodType
from typing import Literal

import torch
from torch import Tensor, nn

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
from mixmae.models.encoders.swin import Swin
from mixmae.models.encoders.swin_stage import SwinStage
from mixmae.models.methods.contract import Method
from mixmae.models.ops.sdpa import pin_attention
from mixmae.trainer.benchmarks.plain import make_plain
from mixmae.trainer.engine.activation_checkpointing import checkpoint_activations
from mixmae.trainer.engine.cpu import apply_cpu_workarounds
from mixmae.trainer.engine.deepspeed_engine import compile_parts
from mixmae.trainer.engine.parameter_groups import exempt_from_decay, optimizer_groups, parameter_groups
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.train import ActivationCheckpointing
from mixmae.trainer.tasks.registry import build_model


def _masked(model: Trainable) -> None:
    assert isinstance(model, Method)
    assert isinstance(model.encoder, Swin)
    for stage in model.encoder.stages:
        stage.forward = MethodType(_without_sorting_by_group, stage)


def _without_sorting_by_group(
    self: SwinStage, x: Tensor, groups: Tensor | None, num_groups: int | None, edit: Callable[[Tensor], Tensor]
) -> Tensor:
    return SwinStage.forward(self, x, groups, None, edit)


def _recomputing(kind: Literal["selective", "torch"]) -> Callable[[Trainable], object]:
    return partial(checkpoint_activations, settings=ActivationCheckpointing(kind=kind))


def _fused(model: Trainable, windows: bool = False) -> None:
    refused = model.set_fused_attention(next(model.parameters()).dtype, windows)
    if windows and refused:
        raise UsageError(f"the variant cannot be measured: {'; '.join(refused)}")


@dataclass(frozen=True)
class Variant:
    """A variant of the step.

    Attributes:
        words: description for tables.
        change: modifies a model in place.
        autocast: fp32 weights under `torch.autocast` instead of bf16 weights.
        compiled: torch.compile, block by block.
        cuda_only: whether it needs a GPU.
        is_published: whether it follows published code, which is MixMAE's on Swin alone.
        graphed: forward and backward pass are one CUDA graph, which the host starts at once.
    """

    words: str
    change: Callable[[Trainable], object] = lambda model: None
    autocast: bool = False
    compiled: bool = False
    cuda_only: bool = False
    is_published: bool = False
    graphed: bool = False


VARIANTS = {
    "plain": Variant("as published code computes it, weights in the run's precision", make_plain, is_published=True),
    "plain-autocast": Variant(
        "as published code computes it, fp32 weights under autocast", make_plain, autocast=True, is_published=True
    ),
    "masked": Variant(
        "tokens sorted by window once per stage, groups kept apart by a mask", _masked, is_published=True
    ),
    "grouped": Variant("tokens sorted by group in the global stages: the default without compilation"),
    "selective": Variant("grouped, norms and GELU recomputed (kind=selective)", _recomputing("selective")),
    "recomputed": Variant("grouped, each block recomputed (kind=torch)", _recomputing("torch")),
    "compiled": Variant("grouped, each block and the loss compiled (train.compile=true)", compiled=True),
    "triton": Variant("grouped, attention of the global stages in one kernel", _fused, cuda_only=True),
    "compiled-triton": Variant("compiled and triton", _fused, compiled=True, cuda_only=True),
    "window": Variant(
        "triton, and attention of all windows in one kernel", partial(_fused, windows=True), cuda_only=True
    ),
    "compiled-window": Variant(
        "compiled and window: the default on GPUs", partial(_fused, windows=True), compiled=True, cuda_only=True
    ),
    "graphed": Variant(
        "compiled-window, without what starting kernels takes: what a host could cost",
        partial(_fused, windows=True),
        compiled=True,
        cuda_only=True,
        graphed=True,
    ),
}
_BEFORE_GRAPH = 2
"""Passes that compile, choose kernels and take workspaces, which a graph cannot record."""


class Weights:
    """Weights that all variants of a recipe share, so that the largest encoder fits on one GPU: fp32 masters and AdamW.

    Args:
        recipe: the model; weights are a function of its seed and the device.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        with device:  # a CPU needs ten seconds to initialize Swin-H
            self.model = build_model(recipe)
        named = dict(self.model.named_parameters())
        self.masters = list(named.values())
        groups = parameter_groups(self.model, recipe.optim.weight_decay, exempt_from_decay(recipe, self.model))
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(groups, named), lr=1e-5, betas=recipe.optim.betas, fused=True
        )

    @cached_property
    def narrow(self) -> list[nn.Parameter]:
        """bf16 copies of the fp32 master weights, as in a run."""
        return [nn.Parameter(master.detach().bfloat16()) for master in self.masters]

    def model_on(self, weights: Sequence[nn.Parameter]) -> Trainable:
        """A copy of the model, to be modified, that uses these weights."""
        return copy.deepcopy(self.model, dict(zip(map(id, self.masters), weights, strict=True)))


class BareStep:
    """Model and AdamW without DeepSpeed, loop, data or telemetry; bf16 weights have fp32 masters, as in a run.

    Args:
        recipe: model, precision and activation checkpointing.
        weights: shared with other variants of the recipe; None creates them.
    """

    def __init__(self, recipe: Recipe, variant: Variant, device: torch.device, weights: Weights | None = None) -> None:
        shared = Weights(recipe, device) if weights is None else weights
        self._optimizer, self._masters = shared.optimizer, shared.masters
        self._is_narrow = recipe.train.precision == "bf16" and not variant.autocast
        self._weights = shared.narrow if self._is_narrow else shared.masters
        self._autocast = variant.autocast
        self._device = device
        self._passes = _Graphed(self._run_passes, self._weights, device) if variant.graphed else self._run_passes
        self.model = shared.model_on(self._weights)
        checkpoint_activations(self.model, recipe.train.activation_checkpointing)
        variant.change(self.model)
        if device.type == "cuda":
            pin_attention()
        elif self._is_narrow:
            apply_cpu_workarounds(self.model)
        if variant.compiled:
            compile_parts(self.model)

    @property
    def bytes(self) -> int:
        """Bytes of weights, master weights and AdamW's moments."""
        states = [*self._masters, *(self._weights if self._is_narrow else ()), *self.model.buffers()]
        return sum(t.numel() * t.element_size() for t in states) + 8 * sum(m.numel() for m in self._masters)

    @property
    def is_graphed(self) -> bool:
        return isinstance(self._passes, _Graphed)

    def loss(self, images: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            loss: Tensor = self.model(images, *inputs)
        return loss

    def __call__(self, images: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """One step; returns its loss, on the device."""
        loss = self._passes(images, inputs)
        self._optimize()
        return loss

    def _run_passes(self, images: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        loss = self.loss(images, inputs)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def _optimize(self) -> None:
        """Optimizer step by multi-tensor kernels, as on DeepSpeed's flat tensors."""
        if self._is_narrow:
            wide = [torch.empty_like(master) for master in self._masters]
            torch._foreach_copy_(wide, [_gradient(weight) for weight in self._weights])
            for weight, master, gradient in zip(self._weights, self._masters, wide, strict=True):
                weight.grad, master.grad = None, gradient
        self._optimizer.step()
        if self._is_narrow:
            torch._foreach_copy_([*self._weights], [*self._masters])
        self._optimizer.zero_grad()


class _Graphed:
    """Passes as one CUDA graph, recorded in the first call, whose images and inputs all later ones compute."""

    def __init__(
        self,
        passes: Callable[[Tensor, Sequence[Tensor]], Tensor],
        weights: Sequence[nn.Parameter],
        device: torch.device,
    ) -> None:
        self._passes, self._weights, self._device = passes, weights, device
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        if self._graph is None:
            self._graph = self._record(images, inputs)
        self._graph.replay()
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            weight.grad = gradient
        return self._loss

    def _record(self, images: Tensor, inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        beside, here = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            for _ in range(_BEFORE_GRAPH):
                self._passes(images, inputs)
                for weight in self._weights:
                    weight.grad = None
        here.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss = self._passes(images, inputs)
        self._gradients = [_gradient(weight) for weight in self._weights]
        return graph


def _gradient(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad
