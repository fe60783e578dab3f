"""Full weights, optimizer states and buffers of a checkpoint, consolidated offline."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.trainer.checkpoints.buffers import mean_buffers
from mixmae.trainer.checkpoints.files import ReadItem, read_slices
from mixmae.trainer.checkpoints.manifest import DamagedError, Manifest, verify_file
from mixmae.trainer.checkpoints.slices import EMA, WEIGHT


def master_weights(checkpoint: Path) -> dict[str, Tensor]:
    """fp32 weights by parameter name, independent of the world size and ZeRO stage that wrote them.

    Raises:
        UsageError: the checkpoint is damaged.
    """
    manifest = _verified(checkpoint)
    return _consolidated(checkpoint, manifest, WEIGHT, manifest.shapes)


def optimizer_states(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """fp32 optimizer states by state name, then by parameter name; frozen parameters have none.

    Raises:
        UsageError: the checkpoint is damaged.
    """
    manifest = _verified(checkpoint)
    return {
        state: _consolidated(checkpoint, manifest, state, _trained(manifest)) for state in manifest.optimizer_states
    }


def _trained(manifest: Manifest) -> list[str]:
    return [name for name in manifest.shapes if name not in manifest.frozen]


def model_weights(checkpoint: Path) -> dict[str, Tensor]:
    """What is exported and started from: fp32 weights, by name, and buffers of floating point numbers; the moving
    average of the weights where the run keeps one (`optim.ema_decay`).

    Raises:
        UsageError: the checkpoint is damaged.
    """
    manifest = _verified(checkpoint)
    buffers = mean_buffers(manifest.paths(checkpoint))
    return {
        **_consolidated(checkpoint, manifest, WEIGHT, manifest.frozen if manifest.ema else manifest.shapes),
        **_averages(checkpoint, manifest),
        **{name: value for name, value in buffers.items() if value.is_floating_point()},
    }


def averaged_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The moving average of trained weights, by name; empty where the run keeps none.

    Raises:
        UsageError: the checkpoint is damaged.
    """
    return _averages(checkpoint, _verified(checkpoint))


def _averages(checkpoint: Path, manifest: Manifest) -> dict[str, Tensor]:
    return _consolidated(checkpoint, manifest, EMA, _trained(manifest)) if manifest.ema else {}


def saved_buffers(checkpoint: Path) -> dict[str, Tensor]:
    """The model's buffers by name, averaged over ranks (see `mean_buffers`).

    Raises:
        UsageError: the checkpoint is damaged.
    """
    return mean_buffers(_verified(checkpoint).paths(checkpoint))


def _verified(checkpoint: Path) -> Manifest:
    try:
        manifest = Manifest.read(checkpoint)
        for name, record in manifest.files.items():
            verify_file(checkpoint / name, record)
    except DamagedError as error:
        raise UsageError(
            f"{checkpoint} is damaged: {error}; take another checkpoint, or resume the run: it falls back to the "
            "newest intact one"
        ) from error
    return manifest


def _consolidated(checkpoint: Path, manifest: Manifest, kind: str, names: Iterable[str]) -> dict[str, Tensor]:
    flat = {name: torch.empty(math.prod(manifest.shapes[name])) for name in names}
    read_slices([ReadItem(kind, name, 0, target) for name, target in flat.items()], manifest.paths(checkpoint))
    return {name: values.view(manifest.shapes[name]) for name, values in flat.items()}
