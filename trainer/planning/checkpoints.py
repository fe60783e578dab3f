"""Size and cost of a checkpoint: fp32 master weights and AdamW's two moments, each rank its share."""

from dataclasses import dataclass

from trainer.planning.devices import Cluster
from trainer.planning.states import Parameters

_BYTES = 12
"""Per parameter."""


@dataclass(frozen=True)
class CheckpointCost:
    """Bytes and seconds of one save."""

    bytes: float
    share: float
    """What one rank copies to host memory, and writes."""
    writers: int
    stall: float
    """Seconds that training stands: the copy to host memory, at the rate of the GPU's slot."""
    seconds: float
    """Until all is written, beside training."""
    host_bytes: float
    """Held in a node's memory until then."""
    kept_bytes: float
    """On disk at most: the kept ones and the one being written."""


def checkpoint_cost(
    model: Parameters, zero_stage: int, cluster: Cluster, keep: int, write_rate: float
) -> CheckpointCost:
    """A save's cost when each node writes `write_rate` bytes per second. At ZeRO stage 0 the first rank has it all."""
    whole = _BYTES * model.total
    writers = cluster.gpus if zero_stage else 1
    nodes = cluster.nodes if zero_stage else 1
    share = whole / writers
    return CheckpointCost(
        whole, share, writers, share / cluster.gpu.host, whole / nodes / write_rate, whole / nodes, (keep + 1) * whole
    )
