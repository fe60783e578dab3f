"""Activation memory, measured by running a recipe's model forward and backward on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mixmae.models.contract import Trainable
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine.activation_checkpointing import checkpoint_activations
from mixmae.trainer.planning.meta_attention import WORKSPACES, Device, attention_of
from mixmae.trainer.planning.op_counter import Tracker
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.train import ActivationCheckpointing
from mixmae.trainer.tasks.contract import Task
from mixmae.trainer.tasks.registry import build_model, task_of

_SMALL, _LARGE = 8, 16
"""Micro-batches of the two runs for the linear fit: live bytes after each operation are affine in the micro-batch."""
Bytes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moment:
    """Bytes that a pass holds on a GPU at one moment."""

    activations: float
    """Saved by the forward pass for the backward pass."""
    temporary: float
    """All else: intermediate results, recomputed blocks, gradients of activations, kernels' workspaces."""
    gradients: float
    """Of parameters, as far as they are computed, in the dtype of the weights."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a pass over a micro-batch holds after each operation, without parameters and buffers."""

    fixed: Bytes
    per_image: Bytes
    gradients: Bytes
    kept: tuple[float, float]
    """Live bytes at the end of the forward pass: fixed, and per image."""
    on_host: float
    """Bytes per image offloaded to host memory."""
    flops: float
    """FLOPs per image, including recomputation."""

    def worst(self, micro_batch: int, with_gradients: bool) -> Moment:
        """The moment of peak memory; counts gradients if they stay with their parameters."""
        others = self.fixed + self.per_image * micro_batch
        gradients = self.gradients if with_gradients else np.zeros_like(self.gradients)
        at = int(np.argmax(others + gradients))
        kept = min(self.kept[0] + self.kept[1] * micro_batch, float(others[at]))
        return Moment(kept, float(others[at]) - kept, float(gradients[at]))

    def growth(self, micro_batch: int) -> float:
        """Bytes per additional image at the peak, without gradients."""
        return float(self.per_image[np.argmax(self.fixed + self.per_image * micro_batch)])

    def peak(self, micro_batch: int, with_gradients: bool) -> float:
        worst = self.worst(micro_batch, with_gradients)
        return worst.activations + worst.temporary + worst.gradients


def measure(recipe: Recipe, policy: ActivationCheckpointing, device: Device = "cuda") -> Footprint:
    """The footprint of the recipe's model under an activation-checkpointing policy, in eager mode."""
    small, large = (_run(task_of(recipe), policy, device, micro_batch) for micro_batch in (_SMALL, _LARGE))
    assert len(small.others) == len(large.others), "the passes differ in their operations"
    slope = (large.others - small.others) / (_LARGE - _SMALL)
    kept = (large.kept - small.kept) / (_LARGE - _SMALL)
    return Footprint(
        fixed=small.others - slope * _SMALL,
        per_image=slope,
        gradients=small.gradients,
        kept=(small.kept - kept * _SMALL, kept),
        on_host=(large.on_host - small.on_host) / (_LARGE - _SMALL),
        flops=(large.flops - small.flops) / (_LARGE - _SMALL),
    )


@dataclass(frozen=True)
class _Pass:
    others: Bytes
    gradients: Bytes
    kept: int
    on_host: int
    flops: int


def _run(task: Task, policy: ActivationCheckpointing, device: Device, micro_batch: int) -> _Pass:
    model = on_meta(task.recipe)
    checkpoint_activations(model, policy)
    data, meta = task.recipe.data, torch.device("meta")
    to_device = ToDevice.of(meta, data)
    pixels = torch.empty(micro_batch, *task.recipe.image_shape, dtype=getattr(torch, data.dtype), device=meta)
    inputs = [tensor.to(meta) for tensor in task.example_inputs(model, micro_batch)]
    known = [*model.parameters(), *model.buffers(), to_device.mean, to_device.inverse_std, *inputs]
    live = Tracker(known, WORKSPACES[device])
    live.watch_gradients(model)
    with attention_of(device), live:
        images = to_device(pixels)
        loss = model(images, *inputs)
        kept = live.now
        loss.backward()
    return _Pass(np.array(live.others, float), np.array(live.gradients, float), kept, live.on_host, live.flops)


def on_meta(recipe: Recipe) -> Trainable:
    """The recipe's model on the meta device; parameters in its precision, buffers unchanged, as in DeepSpeed."""
    with torch.device("meta"):
        model = build_model(recipe)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def buffer_bytes(model: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def describe(policy: ActivationCheckpointing) -> str:
    """A policy in a few characters: `none`, `selective all`, `torch 1-2`, `fairscale all, offloaded`."""
    if policy.kind == "none":
        return "none"
    part = "all" if policy.stages is None else _join_stages(policy.stages)
    return f"{policy.kind} {part}" + (", offloaded" if policy.cpu_offload else "")


def _join_stages(groups: Sequence[str]) -> str:
    """Joins names; consecutive numbers become a range: `1-3,decoder`."""
    numbers = [int(name) for name in groups if name.isdigit()]
    if len(numbers) < 2 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return ",".join(groups)
    return ",".join([f"{numbers[0]}-{numbers[-1]}", *(name for name in groups if not name.isdigit())])
