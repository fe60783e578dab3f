"""Frozen parameters, batch statistics, groups with rates of their own and other optimizers, at every ZeRO stage.

A small module is trained without a break, interrupted and resumed, and on other numbers of ranks: 2, 1 and 2 again.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.checkpoints.buffers import read_buffers
from mixmae.trainer.checkpoints.manifest import Manifest
from mixmae.trainer.checkpoints.weights import master_weights, optimizer_states, saved_buffers
from mixmae.trainer.engine.optimizer import OptimizerChoice, lars
from mixmae.trainer.recipe.schema import Recipe
from tests.helpers import run_ranks, tiny_recipe
from tests.trainer.checkpoints.small import (
    CLIP_GRAD,
    GLOBAL_BATCH,
    MICRO_BATCH,
    WEIGHT_DECAY,
    Job,
    Small,
    plain_loop,
    train,
)

pytestmark = pytest.mark.distributed

SGD = OptimizerChoice(torch.optim.SGD, {"momentum": 0.9})
KINDS: dict[str, tuple[int, str, OptimizerChoice | None]] = {
    **{
        f"adamw {precision} stage {stage}": (stage, precision, None)
        for stage in range(4)
        for precision in ("fp32", "bf16")
        if stage or precision == "fp32"
    },
    "lars stage 0": (0, "fp32", lars()),
    "sgd stage 2": (2, "fp32", SGD),
    "sgd stage 3": (3, "fp32", SGD),
}
"""ZeRO stage, precision and optimizer."""
STATES = {"adamw": {"exp_avg", "exp_avg_sq"}, "lars": {"momentum_buffer"}, "sgd": {"momentum_buffer"}}
CHANGES = {"stages 0 0 0": (0, 0, 0), "stages 1 2 3": (1, 2, 3), "stages 2 3 1": (2, 3, 1), "stages 3 0 2": (3, 0, 2)}
"""ZeRO stages on 2, 1 and 2 ranks, three steps on each."""
WORLDS = [2, 1, 2]


def recipe_for(run_dir: Path, stage: int, precision: str = "fp32") -> Recipe:
    return tiny_recipe(
        **{
            "run_dir": str(run_dir),
            "train.zero_stage": stage,
            "train.precision": precision,
            "train.global_batch": GLOBAL_BATCH,
            "train.micro_batch": MICRO_BATCH,
            "optim.clip_grad": CLIP_GRAD,
            "optim.weight_decay": WEIGHT_DECAY,
        }
    )


def train_whole_and_in_parts(ranks: Any, folder: Path, changes: list[Job]) -> list[dict[str, Any]]:
    """Each kind to step 6, again from its step 3 with other random weights, and what else is to be done."""
    jobs, again = [], []
    for kind, (stage, precision, choice) in KINDS.items():
        whole, part = folder / f"{kind} whole", folder / f"{kind} part"
        jobs.append(Job(recipe_for(whole, stage, precision), 6, choice=choice))
        again.append(Job(recipe_for(part, stage, precision), 6, seed=1, choice=choice))
    facts = train(ranks, jobs)
    if ranks.is_main:
        for job, later in zip(jobs, again, strict=True):
            shutil.copytree(
                complete_checkpoints(job.recipe.run_dir)[0], later.recipe.run_dir / "checkpoints" / "step-00000003"
            )
    torch.distributed.barrier()
    return [*facts, *train(ranks, again), *train(ranks, changes)]


FORMAT_1 = Path(__file__).parent / "format_1"
"""Steps 3 and 6 of a run on two ranks at ZeRO stage 1, written before optimizers were the task's choice."""


def resume_format_1(folder: Path, stage: int) -> Job:
    """Its step 3 again to step 6."""
    shutil.copytree(complete_checkpoints(FORMAT_1)[0], folder / "checkpoints" / "step-00000003")
    return Job(recipe_for(folder, stage), 6, seed=1, scaled=False, model=(False, True))


@dataclass(frozen=True)
class Runs:
    """Run directories.

    Attributes:
        kinds: by number of ranks, a folder of those of all kinds.
        changes: a folder of those that changed ranks and stages.
        format_1: by ZeRO stage.
        plain: what `plain_loop` returns for the changes.
    """

    kinds: dict[int, Path]
    changes: Path
    format_1: dict[int, Path]
    plain: tuple[list[list[float]], dict[str, Tensor], list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(
        {world_size: tmp_path_factory.mktemp(f"ranks-{world_size}") for world_size in (1, 2)},
        tmp_path_factory.mktemp("changes"),
        {stage: tmp_path_factory.mktemp(f"format-1-{stage}") for stage in (1, 3)},
        plain_loop(WORLDS),
    )

    def part_of_changes(part: int) -> list[Job]:
        recipes = [recipe_for(runs.changes / change, stages[part]) for change, stages in CHANGES.items()]
        return [Job(recipe, 3 * part + 3, seed=part) for recipe in recipes]

    old = [resume_format_1(folder, stage) for stage, folder in runs.format_1.items()]
    first = run_ranks(train_whole_and_in_parts, 2, runs.kinds[2], part_of_changes(0))
    second = run_ranks(train_whole_and_in_parts, 1, runs.kinds[1], part_of_changes(1))
    third = run_ranks(train, 2, [*old, *part_of_changes(2)])
    for part, of_ranks in enumerate((first, second, third)):
        for facts in of_ranks:
            assert [fact["error"] for fact in facts] == [None] * len(facts)
            assert [fact["first"] for fact in facts[-len(CHANGES) :]] == [3 * part] * len(CHANGES)
            for fact in facts[len(old) if part == 2 else 0 :]:
                assert fact["rates"] == runs.plain[0][fact["first"] : fact["first"] + len(fact["rates"])]
            if part == 2:
                assert [fact["first"] for fact in facts[: len(old)]] == [3, 3]
    return runs


def content(checkpoint: Path) -> dict[str, Tensor]:
    """Weights, optimizer states, and the buffers of each rank, by name."""
    tensors = {f"weight/{name}": value for name, value in master_weights(checkpoint).items()}
    for state, of_parameters in optimizer_states(checkpoint).items():
        tensors |= {f"{state}/{name}": value for name, value in of_parameters.items()}
    for rank, buffers in enumerate(buffers_of_ranks(checkpoint)):
        tensors |= {f"rank {rank}/{name}": value for name, value in buffers.items()}
    return tensors


def buffers_of_ranks(checkpoint: Path) -> list[dict[str, Tensor]]:
    return [read_buffers(file) for file in Manifest.read(checkpoint).paths(checkpoint)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_interrupted_training_ends_with_the_same_bits(runs: Runs, world_size: int, kind: str) -> None:
    whole, part = (complete_checkpoints(runs.kinds[world_size] / f"{kind} {name}") for name in ("whole", "part"))
    assert [folder.name for folder in part] == [folder.name for folder in whole]
    expected, actual = content(whole[-1]), content(part[-1])
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    before = content(whole[0])
    moved = {name for name, value in expected.items() if not torch.equal(value, before[name])}
    assert {name for name in expected if name not in moved} == {"weight/stem.weight", "weight/stem.bias"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_holds_what_the_optimizer_keeps_by_its_names(runs: Runs, world_size: int, kind: str) -> None:
    newest = complete_checkpoints(runs.kinds[world_size] / f"{kind} whole")[-1]
    manifest = Manifest.read(newest)
    assert manifest.frozen == ["stem.weight", "stem.bias"]
    assert set(manifest.optimizer_states) == STATES[kind.split(maxsplit=1)[0]]
    assert manifest.optimizer_scalars == ({"step": 6.0} if kind.startswith("adamw") else {})
    trained = {"body.weight", "head.weight", "head.bias"}
    assert all(state.keys() == trained for state in optimizer_states(newest).values())


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_keep_statistics_of_their_own(runs: Runs, kind: str) -> None:
    newest = complete_checkpoints(runs.kinds[2] / f"{kind} part")[-1]
    first, second = buffers_of_ranks(newest)
    assert first.keys() == second.keys() == {f"norm.{name}" for name in Small().norm.state_dict()}
    assert first["norm.num_batches_tracked"] == second["norm.num_batches_tracked"] == 12
    for name in ("norm.running_mean", "norm.running_var"):
        assert not torch.equal(first[name], second[name])
        assert torch.allclose(saved_buffers(newest)[name], (first[name] + second[name]) / 2)


@pytest.mark.parametrize("change", CHANGES)
def test_other_ranks_and_stages_continue_as_plain_torch(runs: Runs, change: str) -> None:
    """Weights to rounding; statistics are averaged where the number of ranks changes, their counts' maximum taken."""
    _, expected, expected_buffers = runs.plain
    newest = complete_checkpoints(runs.changes / change)[-1]
    assert newest.name == "step-00000009"
    actual = master_weights(newest)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=0, atol=2e-6), name
    for found, right in zip(buffers_of_ranks(newest), expected_buffers, strict=True):
        assert found["norm.num_batches_tracked"] == right["norm.num_batches_tracked"] == 6 + 12 + 6
        for name in ("norm.running_mean", "norm.running_var"):
            assert torch.allclose(found[name], right[name].float(), rtol=0, atol=2e-6), name


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoints_of_the_first_format_are_resumed(runs: Runs, stage: int) -> None:
    expected = content(complete_checkpoints(FORMAT_1)[-1])
    actual = content(complete_checkpoints(runs.format_1[stage])[-1])
    assert expected.keys() == {name for name in actual if not name.startswith("rank 1/")}  # whose buffers had none
    for name, value in expected.items():
        assert torch.allclose(actual[name].double(), value.double(), rtol=1e-4, atol=1e-6), name
