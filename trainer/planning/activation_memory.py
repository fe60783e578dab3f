"""Activations, measured by running a recipe's model on the meta device: forward, backward, every byte counted."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mixmae.models import MixMAE
from mixmae.trainer.data.stream import ToDevice
from mixmae.trainer.engine.activation_checkpointing import checkpoint_activations
from mixmae.trainer.engine.engine import build_model
from mixmae.trainer.planning.meta_attention import WORKSPACES, Device, attention_of
from mixmae.trainer.planning.op_counter import Tracker
from mixmae.trainer.recipe.schema import ActivationCheckpointing, Recipe

_SMALL, _LARGE = 8, 16
"""Micro-batches of the two runs through which the line is drawn: what is alive after an operation is affine in it."""
Bytes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moment:
    """What a GPU holds of a pass at one moment, in bytes."""

    activations: float
    """Of what the forward pass leaves for the backward pass."""
    temporary: float
    """All else: results on their way, recomputed blocks, gradients of activations, kernels' workspaces."""
    gradients: float
    """Of parameters, as far as they are computed, in the dtype of the weights."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that one pass over a micro-batch holds beside parameters and buffers, after each of its operations."""

    fixed: Bytes
    per_image: Bytes
    gradients: Bytes
    kept: tuple[float, float]
    """What is alive when the forward pass ends: fixed, and per image."""
    on_host: float
    """Bytes per image that are offloaded to host memory."""
    flops: float
    """Operations per image, recomputed ones included."""

    def worst(self, micro_batch: int, with_gradients: bool) -> Moment:
        """The moment at which most is held; gradients count where they stay with their parameters."""
        others = self.fixed + self.per_image * micro_batch
        gradients = self.gradients if with_gradients else np.zeros_like(self.gradients)
        at = int(np.argmax(others + gradients))
        kept = min(self.kept[0] + self.kept[1] * micro_batch, float(others[at]))
        return Moment(kept, float(others[at]) - kept, float(gradients[at]))

    def growth(self, micro_batch: int) -> float:
        """Bytes of one image more at the worst moment, gradients aside."""
        return float(self.per_image[np.argmax(self.fixed + self.per_image * micro_batch)])

    def peak(self, micro_batch: int, with_gradients: bool) -> float:
        worst = self.worst(micro_batch, with_gradients)
        return worst.activations + worst.temporary + worst.gradients


def measure(recipe: Recipe, policy: ActivationCheckpointing, device: Device = "cuda") -> Footprint:
    """What a pass of the recipe's model holds under an activation-checkpointing policy, eagerly run."""
    small, large = (_run(recipe, policy, device, micro_batch) for micro_batch in (_SMALL, _LARGE))
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


def _run(recipe: Recipe, policy: ActivationCheckpointing, device: Device, micro_batch: int) -> _Pass:
    model = on_meta(recipe)
    checkpoint_activations(model, policy)
    settings, meta = recipe.model, torch.device("meta")
    to_device = ToDevice(meta, recipe.data.mean, recipe.data.std)
    pixels = torch.empty(micro_batch, 3, settings.img_size, settings.img_size, dtype=torch.uint8, device=meta)
    per_sample = (micro_batch,) if settings.group_map == "sample" else ()
    groups = torch.zeros(*per_sample, *model.grid, dtype=torch.long, device=meta)
    partners = torch.zeros(settings.num_images, micro_batch, dtype=torch.long, device=meta)
    known = [*model.parameters(), *model.buffers(), to_device.mean, to_device.inverse_std]
    live = Tracker(known, WORKSPACES[device])
    live.watch_gradients(model)
    with attention_of(device), live:
        images = to_device(pixels)
        loss = model(images, groups, partners)
        kept = live.now
        loss.backward()
    return _Pass(np.array(live.others, float), np.array(live.gradients, float), kept, live.on_host, live.flops)


def on_meta(recipe: Recipe) -> MixMAE:
    """The recipe's model on the meta device, parameters in its precision and buffers as they are, as DeepSpeed does."""
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
    stages: list[Any] = [stage for stage in policy.stages if stage != "decoder"]
    whole = len(set(policy.stages)) == 5
    part = "all" if whole else ",".join(map(str, policy.stages))
    if not whole and len(stages) > 1 and stages == list(range(stages[0], stages[-1] + 1)):
        part = f"{stages[0]}-{stages[-1]}" + (",decoder" if "decoder" in policy.stages else "")
    return f"{policy.kind} {part}" + (", offloaded" if policy.cpu_offload else "")
