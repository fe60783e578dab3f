"""Candidate settings of a recipe on a cluster: ZeRO stage, checkpointing and micro-batch, each with memory and time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mixmae.base.errors import UsageError
from mixmae.trainer.planning import traffic
from mixmae.trainer.planning.activation_memory import Footprint, describe
from mixmae.trainer.planning.devices import Cluster
from mixmae.trainer.planning.memory import Memory, largest_micro_batch, peak_memory
from mixmae.trainer.planning.speed import Speed
from mixmae.trainer.planning.states import Limits, Parameters, States, ema_bytes, states
from mixmae.trainer.recipe.hardware import fit_hardware
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.train import ActivationCheckpointing

NONE = "none"
"""The description of no checkpointing, which is always in `policies`."""


@dataclass(frozen=True)
class Workload:
    """A recipe's model with its measured footprints."""

    recipe: Recipe
    parameters: Parameters
    limits: Limits
    model_flops: float
    """Per image, forward and backward, without recomputation."""
    policies: Mapping[str, ActivationCheckpointing]
    """By their description."""
    footprints: Mapping[str, Footprint]
    min_batch: int = 1
    """Minimum images per micro-batch."""

    @property
    def stages(self) -> tuple[int, ...]:
        """ZeRO stages that are compatible with the recipe's precision and compilation."""
        train = self.recipe.train
        allowed = (1, 2, 3) if train.precision == "bf16" else (0, 1, 2, 3)
        return allowed[:-1] if train.compile is True else allowed

    def recomputed(self, policy: str) -> float:
        """FLOPs of recomputation as a fraction of those without.

        Measured, because torch stops recomputing a block at the last tensor that its backward pass needs.
        """
        return self.footprints[policy].flops / self.footprints[NONE].flops - 1

    def held(self, stage: int, gpus: int, accumulates: bool) -> States:
        limits = self.limits_at(stage, gpus)
        held = states(stage, self.recipe.train.precision, self.parameters, gpus, accumulates, limits)
        if self.recipe.optim.ema_decay is None:
            return held
        return replace(held, optimizer=held.optimizer + ema_bytes(stage, self.parameters, gpus))

    def limits_at(self, stage: int, gpus: int) -> Limits:
        """The limits, with overlap where the recipe has it at this stage."""
        staged = self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update={"zero_stage": stage})})
        fitted = fit_hardware(staged, "cuda", gpus).train
        return replace(self.limits, overlaps=stage >= 2 and fitted.overlap_comm is True)

    def memory(self, stage: int, policy: str, gpus: int, micro_batch: int, accumulates: bool) -> Memory:
        held = self.held(stage, gpus, accumulates)
        return peak_memory(held, self.footprints[policy], micro_batch, accumulates)

    def largest(self, stage: int, policy: str, gpus: int, limit: float) -> int:
        """The largest micro-batch that fits without gradient accumulation."""
        return largest_micro_batch(self.held(stage, gpus, False), self.footprints[policy], False, limit)


@dataclass(frozen=True)
class Option:
    """One choice of settings, with its memory and time."""

    stage: int
    policy: str
    micro_batch: int
    accumulation: int
    memory: Memory
    traffic: list[traffic.Traffic]
    compute_seconds: float
    communication_seconds: float | None
    """Of communication that computing waits for; None if the network's bandwidth is unknown; then the step time
    excludes it."""

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + (self.communication_seconds or 0.0)


def option(work: Workload, cluster: Cluster, speed: Speed, stage: int, policy: str, micro_batch: int) -> Option:
    """Memory and time of a choice of stage, policy and micro-batch."""
    per_gpu = work.recipe.train.global_batch // cluster.gpus
    accumulation = per_gpu // micro_batch
    limits = work.limits_at(stage, cluster.gpus)
    parts = traffic.traffic(stage, work.recipe.train.precision, work.parameters, accumulation, limits)
    computing = speed.seconds(per_gpu * work.model_flops * (1 + work.recomputed(policy)), accumulation)
    return Option(
        stage,
        policy,
        micro_batch,
        accumulation,
        work.memory(stage, policy, cluster.gpus, micro_batch, accumulation > 1),
        parts,
        computing,
        _waiting(work, cluster, stage, parts, computing),
    )


def _waiting(
    work: Workload, cluster: Cluster, stage: int, parts: list[traffic.Traffic], computing: float
) -> float | None:
    if not work.limits_at(stage, cluster.gpus).overlaps:
        return traffic.seconds(parts, cluster)
    unhidden = min(1.0, work.limits.reduce_bucket / work.parameters.total)
    return traffic.exposed(parts, cluster, stage, computing, unhidden)


def options(work: Workload, cluster: Cluster, speed: Speed) -> Iterator[Option]:
    """All candidates, including those that do not fit."""
    for stage in work.stages:
        for policy in work.policies:
            for micro_batch in micro_batches(work.recipe.train.global_batch, cluster.gpus, work.min_batch):
                yield option(work, cluster, speed, stage, policy, micro_batch)


def best(work: Workload, cluster: Cluster, speed: Speed) -> Option | None:
    """The fastest option that fits.

    Ties are broken by larger micro-batch, no recomputation, the recipe's own settings, and smaller memory. Larger
    micro-batches are preferred because they utilise a GPU better, which a constant MFU does not show. ZeRO-3 comes
    last: it sends less, but module by module, and the estimates exclude its latency and host overhead. They also
    exclude what selective checkpointing recomputes, which are no matrix products.
    """
    train = work.recipe.train
    own = (train.zero_stage, describe(train.activation_checkpointing))

    def order(found: Option) -> tuple[bool, float, int, bool, bool, float]:
        seconds, recomputes = float(f"{found.step_seconds:.3g}"), found.policy != NONE
        other = (found.stage, found.policy) != own
        return found.stage == 3, seconds, found.accumulation, recomputes, other, found.memory.total

    fitting = (o for o in options(work, cluster, speed) if o.memory.total <= cluster.gpu.usable)
    return min(fitting, key=order, default=None)


def micro_batches(global_batch: int, gpus: int, min_batch: int) -> list[int]:
    """Micro-batches that divide each GPU's part of the global batch and are large enough for the model, ascending.

    Raises:
        UsageError: the global batch is not divisible by the number of GPUs, or too small.
    """
    batch = global_batch
    if batch % gpus:
        below, above = batch - batch % gpus, batch + gpus - batch % gpus
        fits = " or ".join(f"train.global_batch={n}" for n in (below, above) if n)
        raise UsageError(f"train.global_batch={batch} is not divisible by {gpus} GPUs; {fits} is")
    per_gpu = batch // gpus
    if per_gpu < min_batch:
        raise UsageError(
            f"train.global_batch={batch} leaves {per_gpu} images for each of {gpus} GPUs, fewer than the "
            f"{min_batch} that the method needs; set train.global_batch={min_batch * gpus}, or "
            f"--gpus {next(n for n in range(max(1, batch // min_batch), 0, -1) if batch % n == 0)}"
        )
    return [n for n in range(min_batch, per_gpu + 1) if per_gpu % n == 0]


def policies(recipe: Recipe) -> dict[str, ActivationCheckpointing]:
    """No checkpointing, selective, torch's on stages 1 and 2 or on all, and the recipe's own."""
    own = recipe.train.activation_checkpointing
    candidates = [
        ActivationCheckpointing(),
        ActivationCheckpointing(kind="selective"),
        ActivationCheckpointing(kind="torch", stages=("1", "2")),
        ActivationCheckpointing(kind="torch"),
    ]
    return {describe(policy): policy for policy in (*candidates, own)}
