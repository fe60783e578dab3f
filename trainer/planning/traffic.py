"""Communication of an optimizer step: bytes that GPUs exchange, and its duration."""

from dataclasses import dataclass
from typing import Literal

from mixmae.trainer.planning.devices import Cluster
from mixmae.trainer.planning.states import Limits, Parameters, retained

_BACKWARD = 2 / 3
"""Of a step's computing."""
Operation = Literal["all-reduce", "reduce-scatter", "all-gather"]


@dataclass(frozen=True)
class Traffic:
    """A collective operation of one optimizer step; `bytes` is the size of the unsharded tensors."""

    operation: Operation
    bytes: float

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in a ring: an all-reduce is a reduce-scatter and an all-gather."""
        rounds = 2 if self.operation == "all-reduce" else 1
        return rounds * self.bytes * (ranks - 1) / ranks


def traffic(stage: int, precision: str, model: Parameters, accumulation: int, limits: Limits) -> list[Traffic]:
    """Traffic of an optimizer step at a ZeRO stage, in the dtype that DeepSpeed communicates.

    That is the weights' dtype also if gradients are accumulated in fp32, unless gradients are sent in fp32
    (engine.py, communication_data_type). Stage
    2 reduces after every micro-batch, by all-reduce, because its buckets hold gradients of several ranks
    (zero/config.py, use_multi_rank_bucket_allreduce). Stage 3 gathers weights for the forward pass, and again for the
    backward pass those that it did not retain; its persistent parameters once, after the step.
    """
    size = 2 if precision == "bf16" else 4
    whole = size * model.total
    reduced = (4 if limits.sends_fp32 else size) * model.total
    if stage == 0:
        return [Traffic("all-reduce", reduced)]
    if stage < 3:
        return [Traffic("all-reduce", reduced * (accumulation if stage == 2 else 1)), Traffic("all-gather", whole)]
    candidates = model.total - model.persistent
    gathered = (2 * candidates - retained(model, limits)) * accumulation + model.persistent
    return [Traffic("reduce-scatter", reduced * accumulation), Traffic("all-gather", size * gathered)]


def seconds(parts: list[Traffic], cluster: Cluster) -> float | None:
    """Duration of a step's traffic at the full rate of the slowest link; None if that is unknown.

    In a ring each byte crosses between nodes once, so a node's link carries what one rank sends. Excludes latency.
    """
    rate = bandwidth(cluster)
    return None if rate is None else sum(part.sent(cluster.gpus) for part in parts) / rate


def exposed(
    parts: list[Traffic], cluster: Cluster, stage: int, compute_seconds: float, unhidden: float
) -> float | None:
    """Duration of the traffic that computing waits for where it overlaps (`overlap_comm`); None if unknown.

    Stage 2 reduces gradients beside the backward pass, two thirds of computing, and gathers weights behind it; stage 3
    gathers beside both passes too. What is never hidden is the last bucket, which is full when the pass is over.

    Args:
        unhidden: the last bucket's fraction of the gradients.
    """
    total = seconds(parts, cluster)
    if total is None:
        return None
    gathering = seconds([part for part in parts if part.operation == "all-gather"], cluster) or 0.0
    reducing = total - gathering
    if stage == 3:
        return max(unhidden * reducing, total - compute_seconds)
    return max(unhidden * reducing, reducing - _BACKWARD * compute_seconds) + gathering


def bandwidth(cluster: Cluster) -> float | None:
    """Bytes per second of the slowest link in a ring; None if unknown."""
    if cluster.nodes == 1:
        return cluster.gpu.peers
    return None if cluster.link is None else min(cluster.link, cluster.gpu.peers)
