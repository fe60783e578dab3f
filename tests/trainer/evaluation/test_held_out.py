"""Evaluation at intervals: every image once, the same figures on any ranks, and none of the run's numbers changed."""

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.checkpoints.manifest import Manifest
from mixmae.trainer.checkpoints.weights import master_weights, optimizer_states
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation import held_out
from mixmae.trainer.evaluation.features import features_of
from mixmae.trainer.evaluation.held_out import gather_rows, held_out_batches
from mixmae.trainer.evaluation.knn import Bank, Neighbours, nearest
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.ending import close
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import coloured_shards, run_ranks, tiny_recipe


class Numbered:
    """An index of images that are their own numbers."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images

    def read(self, sample: int) -> int:
        return sample


@pytest.mark.parametrize(("images", "batch", "world_size"), [(7, 2, 1), (7, 2, 2), (9, 4, 3), (2, 4, 3), (8, 2, 4)])
def test_every_image_counts_once(monkeypatch: pytest.MonkeyPatch, images: int, batch: int, world_size: int) -> None:
    monkeypatch.setattr(held_out, "_view", lambda *given: (torch.tensor(given[2]), None))
    index: Any = Numbered(images)
    counted: list[int] = []
    batches, beats = set(), deque[None]()
    for rank in range(world_size):
        own = list(
            held_out_batches(index, 8, batch, Ranks(rank, world_size), threads=2, beat=lambda: beats.append(None))
        )
        batches.add(len(own))
        for shown, samples, _ in own:
            assert len(shown) == batch
            assert shown[: len(samples)].tolist() == list(samples)
            counted += samples
    assert sorted(counted) == list(range(images))
    assert len(batches) == 1
    assert len(beats) == world_size * batches.pop(), "a long evaluation is not taken for a stuck run"


def gathered(ranks: Ranks, shards: Path) -> tuple[Tensor, Neighbours]:
    """Mean colours of all images in their order, and the 5 nearest of all but the first 3 to those."""
    index = open_index(shards)
    batches = held_out_batches(index, 16, 4, ranks)
    own = features_of(lambda images: images.mean((2, 3)), batches, ToDevice(ranks.device, (0.5,) * 3, (0.5,) * 3))
    numbers = torch.arange(len(index))[ranks.rank :: ranks.world_size]
    everything = gather_rows(own, len(index), ranks)
    return everything, nearest(Bank(own[numbers >= 3], numbers[numbers >= 3]), everything[:3], 5, ranks)


@pytest.mark.distributed
def test_ranks_gather_features_and_neighbours_of_all(shards: Path) -> None:
    """54 images on 4 ranks: some have one more than others."""
    expected, neighbours = gathered(Ranks(), shards)
    for everything, found in run_ranks(gathered, 4, shards):
        assert torch.equal(everything, expected)
        assert torch.equal(found.labels, neighbours.labels)
        assert torch.allclose(found.cosine, neighbours.cosine)


def train(ranks: Ranks, recipes: list[Any]) -> None:
    for recipe in recipes:
        run = prepare(check(recipe, ranks), ranks)
        fit(run)
        close(run, clean=True)


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.slow)], ids=["1", "3"])
def runs(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same training with and without evaluations, at a ZeRO stage (bf16, drop path)."""
    folder = tmp_path_factory.mktemp("evaluated")
    probe = {"shards": str(coloured_shards(folder / "coloured")), "every": "4 steps"}
    asked = {"evaluate": {"shards": str(shards), "every": "2 steps", "probe": probe}, "train.precision": "bf16"}
    recipes = {}
    for name, settings in (("plain", {"train.precision": "bf16"}), ("evaluated", asked)):
        own = {"data.shards": str(shards), "run_dir": str(folder / name), "train.zero_stage": request.param}
        saved = {"checkpoint.every": "4 steps", "encoder.drop_path_rate": 0.2, "monitoring.enabled": False}
        recipes[name] = tiny_recipe(**own, **saved, **settings)
    run_ranks(train, 1, list(recipes.values()))
    return {name: recipe.run_dir for name, recipe in recipes.items()}


def test_a_run_does_not_notice_that_it_is_evaluated(runs: dict[str, Path]) -> None:
    plain, evaluated = (complete_checkpoints(runs[name])[-1] for name in ("plain", "evaluated"))
    for expected, found in (
        (master_weights(plain), master_weights(evaluated)),
        *zip(optimizer_states(plain).values(), optimizer_states(evaluated).values(), strict=True),
    ):
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    losses = [[event["loss"] for event in read_events(run.parents[1], "step")] for run in (plain, evaluated)]
    assert losses[0] == losses[1]


def test_figures_are_reported_and_kept(runs: dict[str, Path]) -> None:
    events = {event["step"]: event["metrics"] for event in read_events(runs["evaluated"], "evaluation")}
    probed = {"probe_knn", "probe_linear", "probe_effective_rank", "probe_mean_cosine"}
    assert [step for step, figures in events.items() if probed <= figures.keys()] == [4, 8]
    assert [step for step, figures in events.items() if "val_loss" in figures] == [2, 4, 6, 8]
    assert all(0.5 < figures["val_loss"] < 2 for figures in events.values())
    assert all(events[step]["probe_knn"] == events[step]["probe_linear"] == 1.0 for step in (4, 8))
    assert all(1.0 < events[step]["probe_effective_rank"] < 24 for step in (4, 8))
    manifests = [Manifest.read(folder) for folder in complete_checkpoints(runs["evaluated"])]
    assert [manifest.metrics for manifest in manifests] == [events[4], events[8]]


def test_probes_that_cannot_be_are_refused_at_the_start(shards: Path, tmp_path: Path) -> None:
    given = {"data.shards": str(shards), "run_dir": str(tmp_path / "run")}
    with pytest.raises(UsageError, match=r"shard directory .*nowhere does not exist"):
        check(tiny_recipe(**given, **{"evaluate.probe.shards": str(tmp_path / "nowhere")}), Ranks())
