"""Runs of a task at several ZeRO stages, each of them also in two parts, and one of them preempted."""

import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mixmae.base.run_directory import complete_checkpoints
from mixmae.base.signals import StopRequest
from mixmae.trainer.checkpoints.weights import master_weights, optimizer_states
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.units import Span
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.context import Run
from mixmae.trainer.run.ending import close, say_end
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.telemetry.events import read_events
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
    preempt_and_resume(ranks, wholes[-1])


def preempt_and_resume(ranks: Ranks, whole: Recipe) -> None:
    """A recipe again, which saves when a signal asks it to and at its end, and starts twice."""
    checkpoint = whole.checkpoint.model_copy(update={"every": Span(1000, "step")})
    recipe = whole.model_copy(update={"run_dir": preempted(whole.run_dir), "checkpoint": checkpoint})
    for _ in range(2):
        run = prepare(check(recipe, ranks), ranks)
        run.stop, begun = SignalAt(run, 2), run.state.step
        say_end(run, fit(run), begun)
        close(run, clean=True)


class SignalAt(StopRequest):
    """Sends its own process SIGTERM after a step; ranks agree on it one step later."""

    def __init__(self, run: Run, step: int) -> None:
        super().__init__()
        self.run, self.step = run, step

    def reason(self, seconds_before_end: float) -> str | None:
        if self.run.state.step == self.step:
            signal.raise_signal(signal.SIGTERM)
        return super().reason(seconds_before_end)


def preempted(whole: Path) -> Path:
    """The run directory beside that of an undisturbed run."""
    return Path(f"{whole} preempted")


def require_same_end(whole: Path, content: Callable[[Path], dict[str, Tensor]]) -> None:
    """A preempted run stopped between two evaluations, and has the bits, losses and figures of an undisturbed one."""
    run = preempted(whole)
    assert [(event["step"], event["reason"]) for event in read_events(run, "preempted")] == [(3, "SIGTERM on rank 0")]
    assert [event["step"] for event in read_events(run, "resumed")] == [3]
    assert [folder.name for folder in complete_checkpoints(run)] == ["step-00000003", "step-00000004"]
    expected, found = content(whole), content(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    for kind, key in (("step", "loss"), ("evaluation", "metrics")):
        assert [event[key] for event in read_events(run, kind)] == [event[key] for event in read_events(whole, kind)]


def runs_of(
    folder: Path, recipe_for: Callable[..., Recipe], sets: Shards, kinds: Iterable[tuple[int, str]]
) -> Callable[[int, str], Path]:
    """Run directories of one rank, by ZeRO stage and precision; the last of these kinds was also preempted."""
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
