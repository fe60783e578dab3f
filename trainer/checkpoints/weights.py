"""The fp32 weights of a checkpoint, put together without any rank running."""

import math
from pathlib import Path

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.trainer.checkpoints import layout
from mixmae.trainer.checkpoints.files import Wanted, fill
from mixmae.trainer.checkpoints.layout import DamagedError, Manifest


def master_weights(checkpoint: Path, kind: str = "weight") -> dict[str, Tensor]:
    """fp32 weights by parameter name, whatever ranks and ZeRO stage wrote them.

    Args:
        kind: `weight`, or `exp_avg` or `exp_avg_sq` for AdamW's moments.

    Raises:
        UsageError: the checkpoint is not what was written.
    """
    try:
        manifest = Manifest.read(checkpoint)
        for name, written in manifest.files.items():
            layout.verify_file(checkpoint / name, written)
    except DamagedError as error:
        raise UsageError(
            f"{checkpoint} is damaged: {error}; take another checkpoint, or let the run go on: it falls back to the "
            "newest whole one"
        ) from error
    weights = {name: torch.empty(math.prod(shape)) for name, shape in manifest.shapes.items()}
    fill([Wanted(kind, name, 0, flat) for name, flat in weights.items()], manifest.paths(checkpoint))
    return {name: flat.view(manifest.shapes[name]) for name, flat in weights.items()}
