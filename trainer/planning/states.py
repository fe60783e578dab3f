"""Memory that DeepSpeed holds on each GPU at any micro-batch: weights, gradients, optimizer states, buffers.

By arithmetic from parameter counts, as DeepSpeed 0.19.8 allocates it for our configuration; tests
hold it against the tensors of real engines. The class depends on ZeRO stage and precision (engine.py,
`_do_optimizer_sanity_check`):

    stage   fp32                                bf16 (gradients accumulated in fp32)
    0       the engine itself                   refused by the recipe
    1       DeepSpeedZeroOptimizer              BF16_Optimizer
    2       DeepSpeedZeroOptimizer              DeepSpeedZeroOptimizer
    3       DeepSpeedZeroOptimizer_Stage3       DeepSpeedZeroOptimizer_Stage3
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixmae.models.contract import Trainable
from mixmae.trainer.planning.activation_memory import buffer_bytes

_FP32 = 4
_MASTER_AND_MOMENTS = 12
"""Bytes of an fp32 master weight and AdamW's two moments."""
_NORM_BYTES = 8
"""Bytes per element of a gradient whose norm is computed: a copy in double precision."""


@dataclass(frozen=True)
class Parameters:
    """Sizes of a model, in elements."""

    total: int
    largest: int
    persistent: int
    """In tensors below ZeRO-3's persistence threshold, which are replicated."""
    buffers: int
    """Bytes of the model's buffers, and of frozen models beside it, at most: bf16 ones take half."""


@dataclass(frozen=True)
class Limits:
    """Sizes of DeepSpeed's buffers in elements, with DeepSpeed's defaults."""

    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    all_reduce: int = 500_000_000
    """engine.py, MEMORY_OPT_ALLREDUCE_SIZE: the bucket of stage 0 and BF16_Optimizer."""
    overlaps: bool = False
    """overlap_comm."""
    sends_fp32: bool = False
    """communication_data_type, for gradients of bf16 models."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Limits":
        """From a DeepSpeed configuration."""
        zero, default = config["zero_optimization"], cls()
        return cls(
            zero["reduce_bucket_size"],
            zero.get("stage3_prefetch_bucket_size", default.prefetch_bucket),
            zero.get("stage3_param_persistence_threshold", default.persistence_threshold),
            zero.get("stage3_max_live_parameters", default.max_live_parameters),
            overlaps=zero["overlap_comm"],
            sends_fp32=config.get("communication_data_type") == "fp32",
        )


@dataclass(frozen=True)
class States:
    """Bytes on one GPU; all but the last two coexist with activations."""

    weights: float
    """In the compute dtype, unsharded at stages 0 to 2 and as gathered at stage 3; and the model's buffers."""
    gradients: float
    """In the dtype of the weights, if they stay with the parameters until they are reduced."""
    accumulation: float
    """fp32 gradients accumulated over micro-batches."""
    optimizer: float
    """AdamW's moments, and fp32 master weights."""
    buckets: float
    """Communication buckets."""
    reduction: float
    """Additional, except the buckets, while gradients are reduced and activations are freed."""
    update: float
    """Additional to weights, accumulation and optimizer, during the optimizer step."""


def count_parameters(model: Trainable, limits: Limits) -> Parameters:
    sizes = [parameter.numel() for parameter in model.parameters()]
    persistent = sum(size for size in sizes if size <= limits.persistence_threshold)
    frozen = sum(_FP32 * weight.numel() for other in model.frozen_models() for weight in other.parameters())
    return Parameters(sum(sizes), max(sizes), persistent, buffer_bytes(model) + frozen)


def states(stage: int, precision: str, parameters: Parameters, ranks: int, accumulates: bool, limits: Limits) -> States:
    """Memory of a rank at a ZeRO stage; `accumulates` is whether an optimizer step has several micro-batches."""
    if stage == 0:
        return _data_parallel(parameters, limits)
    if stage == 3:
        return _stage3(parameters, ranks, precision, limits)
    if precision == "bf16":
        return (_bf16_stage1 if stage == 1 else _bf16_stage2)(parameters, ranks, limits)
    return _fp32_stages(stage, parameters, ranks, accumulates, limits)


def ema_bytes(stage: int, parameters: Parameters, ranks: int) -> float:
    """Of the moving average of the weights: each rank's share, and at stage 0, where masters are whole, all of it."""
    return _FP32 * parameters.total / (ranks if stage else 1)


def _data_parallel(model: Parameters, limits: Limits) -> States:
    """Stage 0, in fp32: gradients are flattened into one buffer and reduced (engine.py, allreduce_bucket)."""
    total = model.total
    return States(
        weights=_FP32 * total + model.buffers,
        gradients=_FP32 * total,
        accumulation=0,
        optimizer=8 * total,
        buckets=0,
        reduction=_FP32 * min(total, limits.all_reduce + model.largest),
        update=_FP32 * total,  # the gradients
    )


def _bf16_stage1(model: Parameters, ranks: int, limits: Limits) -> States:
    """bf16_optimizer.py: each bf16 gradient is added to an unsharded fp32 one as soon as it is there, and dropped.

    Those are flattened into one buffer, rounded to bf16 in another unless fp32 is sent, and reduced.
    """
    total = model.total
    return States(
        weights=2 * total + model.buffers,
        gradients=0,
        accumulation=_FP32 * total,
        optimizer=_MASTER_AND_MOMENTS * total / ranks,
        buckets=0,
        reduction=(_FP32 + (0 if limits.sends_fp32 else 2)) * min(total, limits.all_reduce + model.largest),
        update=0,
    )


def _bf16_stage2(model: Parameters, ranks: int, limits: Limits) -> States:
    """stage_1_and_2.py: bf16 gradients fill a bucket; a full one is flattened again and reduced.

    This rank's shard is added to its fp32 gradients, parameter by parameter. With overlap a second bucket fills while
    the first is reduced.
    """
    total, bucket = model.total, limits.reduce_bucket
    filled, flattened = 2 * bucket * (2 if limits.overlaps else 1), min(bucket, total)
    return States(
        weights=2 * total + model.buffers,
        gradients=0,
        accumulation=_FP32 * total / ranks,
        optimizer=_MASTER_AND_MOMENTS * total / ranks,
        buckets=filled + (2 + (_FP32 if limits.sends_fp32 else 0)) * flattened + _FP32 * model.largest,
        reduction=0,
        update=_NORM_BYTES * model.largest,
    )


def _fp32_stages(stage: int, model: Parameters, ranks: int, accumulates: bool, limits: Limits) -> States:
    """stage_1_and_2.py: the same bucket; gradients of this rank's shard move from it into a separate buffer.

    With several micro-batches stage 2 adds that buffer to another.
    """
    total, bucket = model.total, limits.reduce_bucket
    part = _FP32 * total / ranks
    flattened = _FP32 * min(bucket, total)
    return States(
        weights=_FP32 * total + model.buffers,
        gradients=_FP32 * total if stage == 1 else 0,
        accumulation=0 if stage == 1 else part * (2 if accumulates else 1),
        optimizer=_MASTER_AND_MOMENTS * total / ranks,
        buckets=_FP32 * bucket * (2 if limits.overlaps else 1) + (flattened if stage == 2 else 0),
        reduction=part + flattened if stage == 1 else 0,
        update=(2 if stage == 1 else 1) * part,
    )


def _stage3(model: Parameters, ranks: int, precision: str, limits: Limits) -> States:
    """stage3.py: weights are prefetched and gathered module by module, and retained for the backward pass.

    Gradients fill a bucket; a full one is reordered by rank and scattered.
    """
    size = 2 if precision == "bf16" else _FP32
    total, bucket = model.total, min(limits.reduce_bucket, model.total)
    alone = ranks == 1  # nothing to gather
    gathered = 0 if alone else retained(model, limits)
    prefetched = 0 if alone else min(total - model.persistent, limits.prefetch_bucket + model.largest)
    scattered = size * bucket + (_FP32 * bucket if limits.sends_fp32 else _FP32 * bucket / ranks)
    return States(
        weights=size * (total / ranks + (0 if alone else model.persistent) + gathered) + model.buffers,
        gradients=0,
        accumulation=_FP32 * total / ranks,
        optimizer=_MASTER_AND_MOMENTS * total / ranks,
        buckets=size * limits.reduce_bucket + max(size * prefetched, scattered),
        reduction=0,
        update=_FP32 * total / ranks + size * limits.reduce_bucket - size * gathered,
    )


def retained(model: Parameters, limits: Limits) -> float:
    """Elements of weights that ZeRO-3 retains from forward to backward, besides the persistent ones.

    Its prefetching reaches weights that are already gathered, and then does not release them
    (partitioned_param_coordinator.py, __params_to_release). So it retains as many as may be live at once.
    """
    return min(model.total - model.persistent, limits.max_live_parameters)
