"""The plan of a recipe on a cluster: memory, time, communication, data."""

from dataclasses import dataclass, replace
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
from mixmae.trainer.benchmarks.results import RESULTS
from mixmae.trainer.engine.deepspeed_engine import deepspeed_config
from mixmae.trainer.engine.schedule import build_schedule
from mixmae.trainer.planning.activation_memory import describe, measure, on_meta
from mixmae.trainer.planning.checkpoint_cost import CheckpointCost, checkpoint_cost
from mixmae.trainer.planning.data_demand import Corpus, Loading, WorkerRate, corpus, loading, worker_rate
from mixmae.trainer.planning.devices import GPUS, Cluster
from mixmae.trainer.planning.memory import Memory
from mixmae.trainer.planning.options import Option, Workload, best, micro_batches, option, options, policies
from mixmae.trainer.planning.speed import Speed, speed
from mixmae.trainer.planning.states import Limits, count_parameters
from mixmae.trainer.recipe.hardware import fit_hardware
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.flops import model_flops
from mixmae.trainer.tasks.registry import task_of

_MOST_GPUS = 4096


@dataclass(frozen=True)
class Assumptions:
    """Values from the command line that replace measurements."""

    mfu: float | None = None
    images: int | None = None
    image_bytes: int | None = None
    write_rate: float = 1e9
    """Bytes per second that a node writes to the checkpoints' storage."""
    price: float | None = None
    """Of an hour of one GPU."""
    results: Path = RESULTS


@dataclass(frozen=True)
class StageRow:
    """Memory at a ZeRO stage with the recipe's micro-batch and policy."""

    stage: int
    memory: Memory
    largest: int


@dataclass(frozen=True)
class PolicyRow:
    """Memory and recomputation of an activation-checkpointing policy."""

    policy: str
    bytes_per_image: float
    recomputed: float
    largest: dict[int, int]
    """The largest micro-batch by ZeRO stage."""


@dataclass(frozen=True)
class Run:
    """Throughput and duration of a whole run with an option."""

    gpus: int
    option: Option
    images_per_second: float
    seconds: float

    @property
    def days(self) -> float:
        return self.seconds / 86_400

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.gpus


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    model: str
    """The task's words for what is trained: the encoder, and what stands on it."""
    cluster: Cluster
    work: Workload
    speed: Speed
    data: Corpus
    steps: int
    own: Run
    """The recipe as it is; `note` describes any change."""
    note: str | None
    chosen: Run
    """The recommended option."""
    stages: list[StageRow]
    policies: list[PolicyRow]
    scaling: list[Run]
    """The chosen stage and policy on fewer GPUs."""
    checkpoint: CheckpointCost
    loading: Loading
    """At the chosen option's images per second."""
    worker_rate: WorkerRate | None
    price: float | None
    """Of an hour of one GPU."""

    def cost(self, run: Run) -> float | None:
        """Of a run, in the price's currency."""
        return None if self.price is None else self.price * run.gpu_hours


def make_plan(recipe: Recipe, cluster: Cluster, given: Assumptions) -> Plan:
    """Plans a recipe's run.

    Raises:
        UsageError: the batch or the streams are not divisible by the number of GPUs, the schedule has no steps, the
            shards' index is damaged, or nothing fits into the GPU's memory.
    """
    recipe.streams_of(0, cluster.gpus)
    model = on_meta(recipe)
    recipe, note = _divided(_staged(recipe, cluster.gpus), cluster.gpus, model.min_batch)
    data = corpus(recipe, given.images, given.image_bytes)
    steps = build_schedule(recipe, round(data.images)).total_steps
    work = _measure(recipe, model, cluster.gpus)
    pace = speed(recipe, cluster.gpu, given.mfu, given.results, cluster.gpus)
    found = best(work, cluster, pace)
    if found is None:
        raise UsageError(_nothing_fits(work, cluster, pace))
    train, own_policy = recipe.train, describe(recipe.train.activation_checkpointing)
    own = option(work, cluster, pace, train.stage, own_policy, train.micro_batch)
    chosen = _run(cluster.gpus, found, recipe, steps)
    rate = worker_rate(recipe, given.results)
    per_node = chosen.images_per_second / cluster.nodes
    return Plan(
        recipe,
        task_of(recipe).describe(),
        cluster,
        work,
        pace,
        data,
        steps,
        _run(cluster.gpus, own, recipe, steps),
        note,
        chosen,
        [_stage(work, cluster, stage, own) for stage in work.stages],
        [_policy(work, cluster, policy) for policy in work.policies],
        list(_scaling(work, cluster, pace, found, steps)),
        checkpoint_cost(
            work.parameters, cluster, recipe.checkpoint, given.write_rate, recipe.optim.ema_decay is not None
        ),
        loading(recipe, per_node, cluster.gpus_per_node, found.micro_batch, data, rate),
        rate,
        given.price,
    )


def _staged(recipe: Recipe, gpus: int) -> Recipe:
    """The recipe with its ZeRO stage chosen, and nothing else: another one may want other switches."""
    stage = fit_hardware(recipe, "cuda", gpus).train.stage
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"zero_stage": stage})})


def _divided(recipe: Recipe, gpus: int, min_batch: int) -> tuple[Recipe, str | None]:
    """The recipe with a micro-batch that divides each GPU's part of the global batch, and a note if it was changed."""
    train, fits = recipe.train, micro_batches(recipe.train.global_batch, gpus, min_batch)
    if train.micro_batch in fits:
        return recipe, None
    nearest = max((n for n in fits if n < train.micro_batch), default=fits[0])
    note = (
        f"train.global_batch={train.global_batch} is not divisible by the recipe's train.micro_batch="
        f"{train.micro_batch} on {gpus} GPUs; planned with train.micro_batch={nearest}"
    )
    return recipe.model_copy(update={"train": train.model_copy(update={"micro_batch": nearest})}), note


def _measure(recipe: Recipe, model: Trainable, gpus: int) -> Workload:
    limits = Limits.of(deepspeed_config(recipe, gpus, "cuda"))
    chosen = policies(recipe)
    footprints = {name: measure(recipe, policy) for name, policy in chosen.items()}
    parameters = count_parameters(model, limits)
    return Workload(recipe, parameters, limits, model_flops(recipe), chosen, footprints, model.min_batch)


def _run(gpus: int, found: Option, recipe: Recipe, steps: int) -> Run:
    rate = recipe.train.global_batch / found.step_seconds
    return Run(gpus, found, rate, steps * found.step_seconds)


def _stage(work: Workload, cluster: Cluster, stage: int, own: Option) -> StageRow:
    memory = work.memory(stage, own.policy, cluster.gpus, own.micro_batch, own.accumulation > 1)
    return StageRow(stage, memory, work.largest(stage, own.policy, cluster.gpus, cluster.gpu.usable))


def _policy(work: Workload, cluster: Cluster, policy: str) -> PolicyRow:
    largest = {stage: work.largest(stage, policy, cluster.gpus, cluster.gpu.usable) for stage in work.stages}
    growth = work.footprints[policy].growth(max(largest.values()))
    return PolicyRow(policy, growth, work.recomputed(policy), largest)


def _scaling(work: Workload, cluster: Cluster, pace: Speed, found: Option, steps: int) -> list[Run]:
    """On parts of one node, or on 1, 2, 4, ... nodes, as far as the batch is divisible and fits."""
    unit, most = (1, cluster.gpus) if cluster.nodes == 1 else (cluster.gpus_per_node, cluster.nodes)
    counts = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
    runs = []
    only = replace(work, policies={found.policy: work.policies[found.policy]})
    for gpus in (unit * count for count in counts):
        if work.recipe.train.global_batch % gpus == 0:
            smaller = best(only, cluster.of(gpus), pace)
            if smaller is not None:
                runs.append(_run(gpus, smaller, work.recipe, steps))
    return runs


def _nothing_fits(work: Workload, cluster: Cluster, pace: Speed) -> str:
    least = min(options(work, cluster, pace), key=lambda o: o.memory.total)
    problem = (
        f"nothing fits {cluster.gpus} x {cluster.gpu.name}: the minimum is {least.memory.total / 2**30:.1f} GiB of "
        f"{cluster.gpu.usable / 2**30:.1f} (ZeRO {least.stage}, train.micro_batch={least.micro_batch}, checkpointing "
        f"{least.policy})"
    )
    larger = [gpu for gpu in GPUS.values() if gpu.usable >= least.memory.total]
    more = next((n for n in _more(work, cluster) if best(work, cluster.of(n), pace) is not None), None)
    remedies = [f"--gpus {more}"] if more else []
    remedies += [f"--gpu {min(larger, key=lambda gpu: gpu.memory).name}"] if larger else []
    return problem + (f"; use {' or '.join(remedies)}" if remedies else "; choose a smaller encoder")


def _more(work: Workload, cluster: Cluster) -> list[int]:
    """Twice, four times, ... as many GPUs, as far as the global batch is divisible by them."""
    batch = work.recipe.train.global_batch
    doubled = (cluster.gpus * 2**power for power in range(1, _MOST_GPUS.bit_length()))
    return [gpus for gpus in doubled if batch % gpus == 0 and batch // gpus >= work.min_batch]
