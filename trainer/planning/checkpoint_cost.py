"""Size and cost of a checkpoint: fp32 master weights, their moving average if there is one, and AdamW's two moments,
each rank its share."""

import math
from dataclasses import dataclass

from mixmae.trainer.planning.devices import Cluster
from mixmae.trainer.planning.states import Parameters
from mixmae.trainer.recipe.schema import Checkpoint

_BYTES, _EMA_BYTES = 12, 4
"""Per parameter."""


@dataclass(frozen=True)
class CheckpointCost:
    """Bytes and seconds of one save."""

    bytes: float
    share: float
    """What each rank copies to host memory, and writes."""
    stall: float
    """Seconds that training stands: the copy to host memory, at the rate of the GPU's slot; or until all is written."""
    seconds: float
    """Until all is written."""
    host_bytes: float
    """Of a node's memory, pinned for the copies; none where training stands until all is written."""
    kept_bytes: float
    """On disk at most: the kept ones and the one being written."""


def checkpoint_cost(
    model: Parameters, cluster: Cluster, settings: Checkpoint, write_rate: float, ema: bool = False
) -> CheckpointCost:
    """A save's cost when each node writes `write_rate` bytes per second; the same at every ZeRO stage."""
    whole = (_BYTES + ema * _EMA_BYTES) * model.total
    share, of_node = whole / cluster.gpus, whole / cluster.nodes
    seconds = of_node / write_rate
    return CheckpointCost(
        whole,
        share,
        share / cluster.gpu.host if settings.asynchronous else seconds,
        seconds,
        cluster.gpus_per_node * _pinned(share) if settings.asynchronous else 0.0,
        (settings.keep + 1) * whole,
    )


def _pinned(size: float) -> int:
    """Bytes that torch's pinned allocator takes for so many: the next power of two."""
    return 1 << (math.ceil(size) - 1).bit_length()
