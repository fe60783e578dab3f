from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.base.errors import UsageError
from mixmae.trainer.planning.activation_memory import measure, on_meta
from mixmae.trainer.planning.devices import GPUS, Cluster, build_cluster
from mixmae.trainer.planning.options import Workload, best, micro_batches, option, options, policies
from mixmae.trainer.planning.speed import Speed
from mixmae.trainer.planning.states import Limits, count_parameters
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.train import ActivationCheckpointing
from mixmae.trainer.tasks.flops import model_flops
from tests.helpers import tiny_recipe

PACE = Speed(1e14, 0.3, "given")


def recipe_of(**changes: Any) -> Recipe:
    return tiny_recipe(**{"train.precision": "bf16", "train.zero_stage": 1, "train.global_batch": 256, **changes})


@cache
def workload() -> Workload:
    recipe, limits = recipe_of(), Limits(reduce_bucket=1000)
    chosen = policies(recipe)
    footprints = {name: measure(recipe, policy) for name, policy in chosen.items()}
    return Workload(
        recipe, count_parameters(on_meta(recipe), limits), limits, model_flops(recipe), chosen, footprints, 2
    )


def with_memory(cluster: Cluster, usable: float) -> Cluster:
    """The cluster with GPUs of which so many bytes are usable."""
    memory = cluster.gpu.memory + (usable - cluster.gpu.usable) / 0.95
    return replace(cluster, gpu=replace(cluster.gpu, memory=memory))


@settings(deadline=None, max_examples=40)
@given(
    stage=st.sampled_from([1, 2, 3]),
    policy=st.sampled_from(["none", "selective all", "torch 1-2", "torch all"]),
    gpus=st.sampled_from([1, 2, 8, 64]),
    megabytes=st.integers(1, 2000),
)
def test_the_largest_micro_batch_is_the_last_that_fits(stage: int, policy: str, gpus: int, megabytes: int) -> None:
    work, limit = workload(), megabytes * 1e6
    largest = work.largest(stage, policy, gpus, limit)
    if largest:
        assert work.memory(stage, policy, gpus, largest, False).total <= limit
    if largest < 4096:
        assert work.memory(stage, policy, gpus, largest + 1, False).total > limit


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(1, 4096), gpus=st.integers(1, 128), mixed=st.integers(2, 5))
def test_micro_batches_share_the_batch_or_it_is_said_what_would(batch: int, gpus: int, mixed: int) -> None:
    try:
        found = micro_batches(batch, gpus, mixed)
    except UsageError:
        assert batch % gpus or batch // gpus < mixed
        return
    assert all(batch % (gpus * size) == 0 and size >= mixed for size in found)
    assert found[-1] == batch // gpus


def test_remedies_work() -> None:
    with pytest.raises(UsageError, match=r"not divisible by 3 GPUs; train.global_batch=255 or train.global_batch=258"):
        micro_batches(256, 3, 2)
    with pytest.raises(UsageError, match=r"leaves 1 images .* set train.global_batch=512, or --gpus 128"):
        micro_batches(256, 256, 2)
    assert micro_batches(256, 128, 2) == [2]
    assert micro_batches(512, 256, 2) == [2]


def test_the_best_is_the_fastest_that_fits() -> None:
    work, cluster = workload(), build_cluster("a100-80g", 8, 8, None)
    found = best(work, cluster, PACE)
    assert found is not None
    others = [o for o in options(work, cluster, PACE) if o.stage != 3]
    assert found.step_seconds <= 1.001 * min(o.step_seconds for o in others)
    assert (found.policy, found.accumulation) == ("none", 1)


def test_less_memory_means_more_recomputation_and_then_zero_3() -> None:
    work, cluster = workload(), build_cluster("a100-80g", 8, 8, None)
    everything = sorted(options(work, cluster, PACE), key=lambda o: o.memory.total)
    needs = {(o.stage == 3, o.policy): o.memory.total for o in reversed(everything)}
    for (third, _), least in needs.items():
        found = best(work, with_memory(cluster, least + 1), PACE)
        assert found is not None
        assert found.memory.total <= least + 2
        assert third or found.stage < 3
    assert best(work, with_memory(cluster, everything[0].memory.total - 1), PACE) is None


def test_accumulation_sends_more_at_stage_2_and_not_at_stage_1() -> None:
    alone = replace(workload(), recipe=recipe_of(**{"train.overlap_comm": False}))
    work, cluster = alone, build_cluster("a100-80g", 16, 8, "100gbps")
    once, often = (option(work, cluster, PACE, 1, "none", size).communication_seconds for size in (16, 2))
    assert once == often
    once, often = (option(work, cluster, PACE, 2, "none", size).communication_seconds for size in (16, 2))
    assert once is not None
    assert often is not None
    assert often == pytest.approx(17 / 3 * once)  # 8 all-reduces and a gather to one of each


def test_overlap_hides_what_the_backward_pass_has_time_for() -> None:
    work, cluster = workload(), build_cluster("a100-80g", 16, 8, "100gbps")
    alone = replace(work, recipe=recipe_of(**{"train.overlap_comm": False}))
    hidden, plain = (option(each, cluster, PACE, 2, "none", 16) for each in (work, alone))
    assert hidden.communication_seconds is not None
    assert plain.communication_seconds is not None
    assert hidden.communication_seconds < plain.communication_seconds
    assert hidden.memory.buckets == plain.memory.buckets + 2 * work.limits.reduce_bucket  # one more, in bf16
    assert not work.limits_at(1, 16).overlaps
    assert not work.limits_at(2, 1).overlaps


def test_time_is_work_over_speed() -> None:
    work, cluster = workload(), build_cluster("a100-80g", 8, 8, None)
    plain, twice = (option(work, cluster, PACE, 1, policy, 32) for policy in ("none", "torch all"))
    assert plain.compute_seconds == pytest.approx(32 * work.model_flops / 1e14)
    more = work.footprints["torch all"].flops / work.footprints["none"].flops
    assert twice.compute_seconds == pytest.approx(more * plain.compute_seconds)
    assert 1.1 < more < 4 / 3


def test_stages_that_the_recipe_refuses_are_not_offered() -> None:
    assert workload().stages == (1, 2, 3)
    compiled = replace(workload(), recipe=recipe_of(**{"train.compile": True})).stages
    assert compiled == (1, 2)
    for stage in compiled:
        recipe_of(**{"train.compile": True, "train.zero_stage": stage})
    assert replace(workload(), recipe=recipe_of(**{"train.precision": "fp32"})).stages == (0, 1, 2, 3)


def test_the_recipes_own_policy_is_among_them() -> None:
    own = ActivationCheckpointing(kind="fairscale", stages=(3,), cpu_offload=True)
    recipe = recipe_of(**{"train.activation_checkpointing": own.model_dump()})
    assert policies(recipe)["fairscale 3, offloaded"] == own
    assert list(policies(recipe_of())) == ["none", "selective all", "torch 1-2", "torch all"]


def test_gpus_of_the_table_fit_the_small_model() -> None:
    for name in GPUS:
        assert best(workload(), build_cluster(name, 8, 8, None), PACE) is not None
