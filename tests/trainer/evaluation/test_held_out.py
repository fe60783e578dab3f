"""Evaluation at intervals: every image once, the same figures on any ranks, and none of the run's numbers changed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.checkpoints.manifest import Manifest
from mixmae.trainer.checkpoints.weights import master_weights
from mixmae.trainer.data.index import open_index
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation import held_out
from mixmae.trainer.run.run_directory import read_events
from tests.helpers import tiny_recipe
from tests.warm import run_module


@pytest.mark.parametrize(("images", "batch", "world_size"), [(7, 2, 1), (7, 2, 2), (9, 4, 3), (2, 4, 3), (8, 2, 4)])
def test_every_image_counts_once(monkeypatch: pytest.MonkeyPatch, images: int, batch: int, world_size: int) -> None:
    monkeypatch.setattr(held_out, "_view", lambda index, sample, size, ratio: torch.tensor(sample))
    index: Any = SimpleNamespace(__len__=lambda: images)
    index = type("Index", (), {"__len__": lambda self: images})()
    counted: list[int] = []
    batches = set()
    for rank in range(world_size):
        own = list(held_out.held_out_batches(index, 8, batch, Ranks(rank, world_size)))
        batches.add(len(own))
        for images_of, samples in own:
            assert images_of[: len(samples)].tolist() == list(samples)
            assert len(images_of) == batch
            counted += samples
    assert sorted(counted) == list(range(images))
    assert len(batches) == 1


def train(shards: Path, run_dir: Path, **changes: Any) -> Path:
    settings = {"data.shards": str(shards), "run_dir": str(run_dir), "checkpoint.every": "4 steps", **changes}
    file = run_dir.with_suffix(".yaml")
    file.write_text(tiny_recipe(**settings).to_yaml())
    done = run_module("mixmae.trainer.train", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_figures_are_reported_and_kept_and_change_nothing(shards: Path, tmp_path: Path) -> None:
    asked = {"evaluate.shards": str(shards), "evaluate.every": "2 steps", "checkpoint.best_metric": "val_loss"}
    evaluated = train(shards, tmp_path / "evaluated", **asked)
    events = read_events(evaluated, "evaluation")
    assert [event["step"] for event in events] == [2, 4, 6, 8]
    assert all(0.5 < event["metrics"]["val_loss"] < 2 for event in events)
    manifests = [Manifest.read(folder) for folder in complete_checkpoints(evaluated)]
    assert [manifest.metrics["val_loss"] for manifest in manifests] == [
        event["metrics"]["val_loss"] for event in events if event["step"] in (4, 8)
    ]
    plain = train(shards, tmp_path / "plain")
    weights, expected = (master_weights(complete_checkpoints(run)[-1]) for run in (evaluated, plain))
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    assert len(open_index(shards)) == 54
