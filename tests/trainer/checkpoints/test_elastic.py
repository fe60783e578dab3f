"""A run continues on other numbers of ranks and at other ZeRO stages: same images, same losses to rounding."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.checkpoints.manifest import Manifest
from mixmae.trainer.checkpoints.weights import master_weights, optimizer_states
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run import saving
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.ending import close
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.telemetry.events import read_events
from mixmae.trainer.telemetry.sample_log import read_samples
from tests.helpers import run_ranks, tiny_recipe

pytestmark = pytest.mark.distributed

CHANGES = {
    "fp32 stage 0": ("fp32", [(0, 2), (0, 1), (0, 4)]),
    "fp32 stages 0 1 2": ("fp32", [(0, 2), (1, 1), (2, 4)]),
    "fp32 stages 2 0 3": ("fp32", [(2, 2), (0, 4), (3, 1)]),
    "bf16 stage 1": ("bf16", [(1, 2), (1, 1), (1, 4)]),
    "bf16 stage 2": ("bf16", [(2, 2), (2, 1), (2, 4)]),
    "bf16 stage 3": ("bf16", [(3, 2), (3, 1), (3, 4)]),
    "bf16 stages 1 3 2": ("bf16", [(1, 2), (3, 2), (2, 4)]),
    "bf16 stages 3 1 3": ("bf16", [(3, 4), (1, 2), (3, 1)]),
}
"""Precision, then (ZeRO stage, ranks) for steps 1 to 4, 5 to 8 and 9 to 12."""
STEPS = (4, 8, 12)
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def content(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    return master_weights(checkpoint) if kind == "weight" else optimizer_states(checkpoint)[kind]


def recipe_for(shards: Path, run_dir: Path, precision: str, stage: int) -> Recipe:
    return tiny_recipe(
        **{
            "data.shards": str(shards),
            "run_dir": str(run_dir),
            "train.zero_stage": stage,
            "train.precision": precision,
            "train.duration": "12 steps",
            "optim.clip_grad": 0.05,
            "optim.base_lr": 0.2,
            "encoder.drop_path_rate": 0.2,
            "checkpoint.every": "4 steps",
            "monitoring.enabled": False,
            "log.samples": True,
        }
    )


def train(ranks: Ranks, recipes: list[tuple[Recipe, int]]) -> list[int]:
    """Trains each recipe from its newest checkpoint until a step; returns where each began."""
    began = []
    for recipe, until in recipes:
        run = prepare(check(recipe, ranks), ranks)
        began.append(run.state.step)
        run.stop = StopAt(run, until)  # type: ignore[assignment]
        fit(run)
        close(run, clean=True)
    return began


class StopAt:
    """Asks a run to stop so that it does right after a step: ranks agree on it one step later."""

    def __init__(self, run: Any, step: int) -> None:
        self.run, self.step = run, step

    def reason(self, seconds_before_end: float) -> str | None:
        return "enough" if self.run.state.step >= self.step - 1 else None


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories, by name of change: trained in three parts; and by precision: without a change."""
    folder = tmp_path_factory.mktemp("elastic")
    for precision, stage in (("fp32", 2), ("bf16", 2)):
        whole = recipe_for(shards, folder / precision, precision, stage)
        run_ranks(train, 2, [(whole, STEPS[-1])])
    for part, until in enumerate(STEPS):
        for world_size in (1, 2, 4):
            recipes = [
                (recipe_for(shards, folder / change, precision, parts[part][0]), until)
                for change, (precision, parts) in CHANGES.items()
                if parts[part][1] == world_size
            ]
            if recipes:
                for began in run_ranks(train, world_size, recipes):
                    assert set(began) == {until - 4}
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_losses_continue_as_if_nothing_had_changed(runs: Path, change: str) -> None:
    precision, _ = CHANGES[change]
    expected, actual = ([e["loss"] for e in read_events(runs / name, "step")] for name in (precision, change))
    assert actual == pytest.approx(expected, abs=2e-6 if precision == "fp32" else 5e-4)
    assert expected[-1] < expected[0] - 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_weights_and_moments_do_too(runs: Path, change: str, kind: str) -> None:
    precision, _ = CHANGES[change]
    expected = content(complete_checkpoints(runs / precision)[-1], kind)
    actual = content(complete_checkpoints(runs / change)[-1], kind)
    first = content(complete_checkpoints(runs / precision)[0], kind)
    moved = torch.stack([(expected[name] - first[name]).norm() for name in expected]).norm()
    apart = torch.stack([(expected[name] - actual[name]).norm() for name in expected]).norm()
    assert apart < moved * (1e-4 if precision == "fp32" else 0.05)


def test_every_step_takes_the_same_images_in_the_same_order(runs: Path) -> None:
    expected = read_samples(runs / "fp32")
    assert list(expected) == list(range(1, STEPS[-1] + 1))
    for change in CHANGES:
        assert read_samples(runs / change) == expected


def test_every_change_took_every_step_of_the_optimizer(runs: Path) -> None:
    for change, (_, parts) in CHANGES.items():
        manifests = [Manifest.read(checkpoint) for checkpoint in complete_checkpoints(runs / change)]
        assert [manifest.optimizer_scalars for manifest in manifests] == [{"step": step} for step in STEPS]
        assert [(manifest.zero_stage, manifest.world_size) for manifest in manifests] == parts


def test_what_another_stage_reads_is_what_was_written(runs: Path, shards: Path, tmp_path: Path) -> None:
    """Resumed elsewhere and saved at once, a checkpoint has the same bits: nothing is lost on the way."""
    for change, stage, world_size in (("bf16 stage 1", 3, 4), ("bf16 stage 3", 2, 1), ("fp32 stages 0 1 2", 0, 2)):
        copy = tmp_path / change
        shutil.copytree(runs / change, copy)
        before = complete_checkpoints(copy)[-1].rename(copy / "before")
        complete_checkpoints(copy)[-1].rename(copy / "checkpoints" / "damaged-step-00000008")
        shutil.copytree(before, copy / "checkpoints" / "step-00000012")
        recipe = recipe_for(shards, copy, CHANGES[change][0], stage)
        run_ranks(save_again, world_size, recipe)
        for kind in KINDS:
            written, again = content(before, kind), content(complete_checkpoints(copy)[-1], kind)
            assert all(torch.equal(value, again[name]) for name, value in written.items()), (change, kind)


def save_again(ranks: Ranks, recipe: Recipe) -> None:
    run = prepare(check(recipe, ranks), ranks)
    saving.save(run)
    run.saver.wait()
    close(run, clean=True)
