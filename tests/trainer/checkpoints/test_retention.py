"""The last checkpoints, one every so often, and the best are kept; a half-removed one is no checkpoint."""

from pathlib import Path

import pytest

from mixmae.base.run_directory import checkpoint_step, complete_checkpoints
from mixmae.trainer.checkpoints.retention import prune
from mixmae.trainer.recipe.sections.checkpoint import Checkpoint
from tests.trainer.checkpoints.test_manifest import make


def grow(run_dir: Path, settings: Checkpoint, losses: dict[int, float | None]) -> list[int]:
    """Steps of the checkpoints left when the folder was pruned after each save."""
    for step, loss in losses.items():
        prune(run_dir, make(run_dir, step, loss), settings)
    return [checkpoint_step(folder) for folder in complete_checkpoints(run_dir)]


FALLING: dict[int, float | None] = {step: 1 - step / 100 for step in range(4, 41, 4)}


@pytest.mark.parametrize(
    ("settings", "losses", "left"),
    [
        ({"keep": 1}, FALLING, [40]),
        ({"keep": 3}, FALLING, [32, 36, 40]),
        ({"keep": 2, "keep_every": "10 steps"}, FALLING, [12, 20, 32, 36, 40]),  # the first ones after 10, 20, 30
        ({"keep": 1, "keep_every": "1 epoch"}, FALLING, [12, 20, 32, 40]),  # an epoch has 10 steps
        ({"keep": 1, "keep_every": "160 samples"}, FALLING, [20, 40]),
        ({"keep": 1, "keep_best": 2}, {4: 0.3, 8: 0.9, 12: None, 16: 0.1, 20: 0.5}, [4, 16, 20]),
        ({"keep": 2, "keep_best": 1}, {4: None, 8: None, 12: None}, [8, 12]),
    ],
)
def test_what_is_kept(
    tmp_path: Path, settings: dict[str, object], losses: dict[int, float | None], left: list[int]
) -> None:
    assert grow(tmp_path, Checkpoint.model_validate(settings), losses) == left


def test_an_abandoned_history_is_removed(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        make(tmp_path, step)
    prune(tmp_path, make(tmp_path, 6), Checkpoint(keep=2))
    assert [checkpoint_step(folder) for folder in complete_checkpoints(tmp_path)] == [4, 6]


@pytest.mark.parametrize(("mode", "left"), [("max", [4, 12, 20]), ("min", [8, 16, 20])])
def test_the_best_by_a_metric_of_the_evaluation(tmp_path: Path, mode: str, left: list[int]) -> None:
    settings = Checkpoint.model_validate({"keep": 1, "keep_best": 2, "best_metric": "top1", "best_mode": mode})
    for step, top1 in {4: 0.7, 8: 0.1, 12: 0.6, 16: 0.2, 20: None}.items():
        make(tmp_path, step, loss=step, metrics={} if top1 is None else {"top1": top1})
    prune(tmp_path, complete_checkpoints(tmp_path)[-1], settings)
    assert [checkpoint_step(folder) for folder in complete_checkpoints(tmp_path)] == left
