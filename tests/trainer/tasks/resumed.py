"""Runs of a task at several ZeRO stages, each of them also in two parts."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.checkpoints.weights import master_weights, optimizer_states
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from tests.helpers import run_ranks
from tests.trainer.checkpoints.test_elastic import train


class Shards(NamedTuple):
    training: Path
    held_out: Path


def train_and_resume(ranks: Ranks, wholes: list[Recipe]) -> None:
    """Each recipe to its end, and again, in the folder beside, from its second step."""
    train(ranks, [(recipe, 99) for recipe in wholes])
    parts = [recipe.model_copy(update={"run_dir": Path(f"{recipe.run_dir} part")}) for recipe in wholes]
    for whole, part in zip(wholes, parts, strict=True):
        shutil.copytree(whole.run_dir / "checkpoints" / "step-00000002", part.run_dir / "checkpoints" / "step-00000002")
    train(ranks, [(recipe, 99) for recipe in parts])


def runs_of(
    folder: Path, recipe_for: Callable[..., Recipe], sets: Shards, kinds: Iterable[tuple[int, str]]
) -> Callable[[int, str], Path]:
    """Run directories of one rank, by ZeRO stage and precision."""
    recipes = [
        recipe_for(sets, folder / f"{precision} {stage}", **{"train.zero_stage": stage, "train.precision": precision})
        for stage, precision in kinds
    ]
    run_ranks(train_and_resume, 1, recipes)
    return lambda stage, precision: folder / f"{precision} {stage}"


def content(
    run_dir: Path, more: Callable[[Path], dict[str, dict[str, Tensor]]] = lambda checkpoint: {}
) -> dict[str, Tensor]:
    """Weights, optimizer states, and what else a task asks of the checkpoint of step 4, which is the last."""
    last = complete_checkpoints(run_dir)[-1]
    assert last.name == "step-00000004"
    states = {"weight": master_weights(last), **more(last), **optimizer_states(last)}
    return {f"{kind}/{name}": value for kind, values in states.items() for name, value in values.items()}
