"""Planned traffic against what real engines send, as DeepSpeed's logger of communication counts it."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.trainer.benchmarks.scale import OPERATIONS, bytes_of_a_step, planned
from mixmae.trainer.engine import deepspeed_engine
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.planning.activation_memory import on_meta
from mixmae.trainer.planning.devices import build_cluster
from mixmae.trainer.planning.states import Limits, count_parameters
from mixmae.trainer.planning.traffic import Traffic, exposed, seconds, traffic
from mixmae.trainer.recipe.hardware import Device
from mixmae.trainer.recipe.schema import Recipe
from tests.helpers import run_ranks
from tests.trainer.planning.test_planning_states import BUCKET, LIMITS, Case, recipe_for

WORLD_SIZE = 2
CASES: list[Case] = [
    (0, "fp32", 2),
    (1, "fp32", 2),
    (2, "fp32", 1),
    (3, "fp32", 1),
    (1, "bf16", 2),
    (2, "bf16", 2),
    (3, "bf16", 2),
]


def recomputing(recipe: Recipe) -> Recipe:
    policy = recipe.train.activation_checkpointing.model_copy(update={"kind": "torch"})
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"activation_checkpointing": policy})})


def count(ranks: Ranks, recipes: list[Recipe], zero: dict[str, int]) -> list[dict[str, float]]:
    """Bytes by operation of a step of each recipe."""
    made = deepspeed_engine.deepspeed_config

    def configured(recipe: Recipe, world_size: int, device: Device | None = None) -> dict[str, Any]:
        config = made(recipe, world_size, device)
        config["zero_optimization"].update(zero)
        return config

    deepspeed_engine.deepspeed_config = configured
    return [bytes_of_a_step(recipe, ranks) for recipe in recipes]


def expected(recipe: Recipe, limits: Limits) -> dict[str, float]:
    return {**dict.fromkeys(OPERATIONS, 0.0), **planned(recipe, WORLD_SIZE, limits)}


@pytest.mark.distributed
def test_engines_send_what_was_planned() -> None:
    """To 1 %: buffers are padded, and norms are reduced too."""
    recipes = [recipe_for(case, WORLD_SIZE) for case in CASES]
    found = run_ranks(count, WORLD_SIZE, recipes, {"reduce_bucket_size": BUCKET})[0]
    for case, recipe, counted in zip(CASES, recipes, found, strict=True):
        for operation, sent in expected(recipe, LIMITS).items():
            assert counted[operation] == pytest.approx(sent, rel=0.01, abs=2000), (case, operation)


@pytest.mark.distributed
def test_zero_3_gathers_again_what_it_did_not_keep() -> None:
    """Where fewer weights may be there at once than the model has, with blocks that are computed twice too; to 5 %,
    since whole tensors are kept."""
    plain = recipe_for((3, "bf16", 1), WORLD_SIZE)
    total = count_parameters(on_meta(plain), LIMITS).total
    limits = Limits(BUCKET, BUCKET // 10, max_live_parameters=total // 3)
    zero = {
        "reduce_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": limits.prefetch_bucket,
        "stage3_max_live_parameters": limits.max_live_parameters,
        "stage3_max_reuse_distance": 0,  # its default of 1e9 keeps a small model whole
    }
    recipes = [plain, recomputing(plain)]
    for recipe, counted in zip(recipes, run_ranks(count, WORLD_SIZE, recipes, zero)[0], strict=True):
        gathered = expected(recipe, limits)["all-gather"]
        assert gathered > 1.3 * 2 * total
        assert counted["all-gather"] == pytest.approx(gathered, rel=0.05)


def ring(values: list[list[float]]) -> tuple[list[list[float]], list[int]]:
    """A ring all-reduce as in textbooks: every rank's values after it, and how many each rank sent."""
    ranks = len(values)
    data, sent = [list(own) for own in values], [0] * ranks
    for phase in range(2):
        for step in range(ranks - 1):
            moves = []
            for rank in range(ranks):
                chunk = (rank + phase - step) % ranks
                moves.append(((rank + 1) % ranks, chunk, data[rank][chunk]))
                sent[rank] += 1
            for to, chunk, value in moves:
                data[to][chunk] = value if phase else data[to][chunk] + value
    return data, sent


def squares(side: int) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(-9, 9), min_size=side, max_size=side), min_size=side, max_size=side)


@settings(deadline=None)
@given(st.integers(1, 9).flatmap(squares))
def test_sent_bytes_are_those_of_a_ring(values: list[list[float]]) -> None:
    """As many values as ranks, of 8 bytes each."""
    ranks = len(values)
    data, sent = ring(values)
    sums = [sum(column) for column in zip(*values, strict=True)]
    assert all(own == sums for own in data)
    assert {Traffic("all-reduce", 8 * ranks).sent(ranks)} == {8 * count for count in sent}
    halves = Traffic("reduce-scatter", 8 * ranks).sent(ranks) + Traffic("all-gather", 8 * ranks).sent(ranks)
    assert halves == Traffic("all-reduce", 8 * ranks).sent(ranks)


def test_the_slowest_link_decides() -> None:
    parts = [Traffic("all-gather", 8e9)]
    one_node = build_cluster("a100-80g", 8, 8, "200gbps")
    assert seconds(parts, one_node) == pytest.approx(7e9 / 300e9)
    assert seconds(parts, build_cluster("a100-80g", 16, 8, "200gbps")) == pytest.approx(7.5e9 / 25e9)
    assert seconds(parts, build_cluster("a100-80g", 16, 8, "8x400gbps")) == pytest.approx(7.5e9 / 300e9)
    assert seconds(parts, build_cluster("a100-80g", 16, 8, None)) is None
    assert seconds(parts, build_cluster("a100-80g", 1, 8, None)) == 0


def test_what_overlap_leaves_to_wait_for() -> None:
    """In a node of eight, reducing takes 47 ms, gathering 23; the backward pass is two thirds of computing."""
    parts, node = [Traffic("all-reduce", 8e9), Traffic("all-gather", 8e9)], build_cluster("a100-80g", 8, 8, None)
    reducing, gathering = 14e9 / 300e9, 7e9 / 300e9
    assert exposed(parts, node, 2, 0.3, unhidden=0.1) == pytest.approx(0.1 * reducing + gathering)
    assert exposed(parts, node, 2, 0.03, unhidden=0.1) == pytest.approx(reducing - 0.02 + gathering)
    assert exposed(parts, node, 3, 0.3, unhidden=0.1) == pytest.approx(0.1 * reducing)
    assert exposed(parts, build_cluster("a100-80g", 16, 8, None), 2, 0.3, unhidden=0.1) is None


def test_gradients_that_travel_in_fp32_are_twice_the_bytes() -> None:
    model = count_parameters(on_meta(recipe_for((2, "bf16", 1), WORLD_SIZE)), LIMITS)
    narrow, wide = (traffic(2, "bf16", model, 1, replace(LIMITS, sends_fp32=fp32)) for fp32 in (False, True))
    assert [part.bytes for part in wide] == [2 * narrow[0].bytes, narrow[1].bytes]
