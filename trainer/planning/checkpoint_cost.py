"""Size and cost of a checkpoint: fp32 master weights, their moving average if there is one, and AdamW's two moments,
sharded over ranks."""

import math
from dataclasses import dataclass

from mixmae.trainer.planning.devices import Cluster
from mixmae.trainer.planning.states import Parameters
from mixmae.trainer.recipe.sections.checkpoint import Checkpoint

_BYTES, _EMA_BYTES = 12, 4
"""Per parameter."""


@dataclass(frozen=True)
class CheckpointCost:
    """Bytes and seconds of one save."""

    bytes: float
    share: float
    """Bytes that each rank copies to host memory and writes."""
    stall: float
    """Seconds that training is blocked: for the copy to host memory, or until the checkpoint is written."""
    seconds: float
    """Until the checkpoint is written."""
    host_bytes: float
    """Pinned host memory of a node for the copies; 0 if saving is not asynchronous."""
    kept_bytes: float
    """Maximum on disk: kept checkpoints and the one being written."""


def checkpoint_cost(
    model: Parameters, cluster: Cluster, settings: Checkpoint, write_rate: float, ema: bool = False
) -> CheckpointCost:
    """Cost of a save if each node writes `write_rate` bytes per second; independent of the ZeRO stage."""
    whole = (_BYTES + ema * _EMA_BYTES) * model.total
    share, per_node = whole / cluster.gpus, whole / cluster.nodes
    seconds = per_node / write_rate
    return CheckpointCost(
        whole,
        share,
        share / cluster.gpu.host if settings.asynchronous else seconds,
        seconds,
        cluster.gpus_per_node * _pinned(share) if settings.asynchronous else 0.0,
        (settings.keep + 1) * whole,
    )


def _pinned(size: float) -> int:
    """Bytes that torch's pinned allocator takes for `size`: the next power of two."""
    return 1 << (math.ceil(size) - 1).bit_length()
