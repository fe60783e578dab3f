"""Every recipe for pretraining is planned, and says in its head what the plan says."""

import re

import pytest

from mixmae.trainer.planning.devices import build_cluster, find_gpu
from mixmae.trainer.planning.plan import Assumptions, make_plan
from mixmae.trainer.recipe.library import library
from mixmae.trainer.recipe.loading import load_recipe

RECIPES = {name: recipe for name, recipe in library().items() if name.startswith("pretrain/") and "demo" not in name}
COST = re.compile(r"([\d.]+) days by its roofline, (\d+) GiB of (\d+) a GPU")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_costs_what_its_head_says(name: str) -> None:
    cluster = build_cluster(find_gpu("a100-80g", None, None, None), 8, 8, None)
    plan = make_plan(load_recipe(RECIPES[name].file), cluster, Assumptions())
    found = COST.search(RECIPES[name].head[2])
    assert found is not None
    days, used, usable = found.groups()
    digits = len(days.partition(".")[2])
    assert plan.own.days == pytest.approx(float(days), abs=0.51 * 10**-digits)
    memory = plan.own.option.memory.total
    assert memory <= cluster.gpu.usable
    assert (round(memory / 2**30), round(cluster.gpu.usable / 2**30)) == (int(used), int(usable))
    assert {row.stage for row in plan.stages} == {1, 2, 3}
    assert all(row.largest >= plan.own.option.micro_batch for row in plan.stages)
