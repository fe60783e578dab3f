"""Linear probes: each classifier as if alone, resumed bit for bit, from cached features too, on any ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import complete_checkpoints
from mixmae.models.encoders.registry import create_encoder
from mixmae.models.heads.linear_probe import FeatureNorm, LinearProbe, Variant
from mixmae.trainer.checkpoints.weights import master_weights, optimizer_states, saved_buffers
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation.evaluate import main as evaluate
from mixmae.trainer.evaluation.feature_cache import FeatureCache
from mixmae.trainer.evaluation.held_out import held_out_batches
from mixmae.trainer.export.encoder_directory import write_encoder_directory
from mixmae.trainer.export.export import export
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import run_ranks, tiny_recipe
from tests.trainer.checkpoints.test_elastic import train

SIZES = {key: value for key, value in tiny_recipe().encoder.model_dump().items() if key not in ("name", "init")}


def encoder(**changes: Any) -> Any:
    torch.manual_seed(1)
    return create_encoder("mixmae_swin_nano", **{**SIZES, **changes})


def recipe_for(shards: Path, run_dir: Path, **changes: Any) -> Recipe:
    settings = {
        "task": "linear",
        "encoder.init": str(run_dir.parent / "encoder"),
        "data.shards": str(shards),
        "run_dir": str(run_dir),
        "train.duration": "4 steps",
        "train.micro_batch": 4,
        "train.zero_stage": 0,
        "optim": {"base_lr": 3.0, "warmup": "1 step", "weight_decay": 0.0},
        "linear": {"lr_scales": [0.5, 2.0], "stages": [1, 2]},
        "evaluate": {"shards": str(shards), "every": "2 steps"},
        "checkpoint": {"every": "1 step", "keep": 10},
        "monitoring.enabled": False,
    }
    return tiny_recipe(**{**settings, **changes})


CHANGES: dict[str, dict[str, Any]] = {
    "augmented": {},
    "cached": {"linear.cache_features": True},
}


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one rank by name of change; beside them, with ` part`, those that went on from step 2."""
    folder = tmp_path_factory.mktemp("linear")
    write_encoder_directory(folder / "encoder", "mixmae_swin_nano", SIZES, encoder().state_dict())
    wholes = [recipe_for(shards, folder / name, **changes) for name, changes in CHANGES.items()]
    run_ranks(train, 1, [(recipe, 99) for recipe in wholes])
    parts = [recipe.model_copy(update={"run_dir": Path(f"{recipe.run_dir} part")}) for recipe in wholes]
    for whole, part in zip(wholes, parts, strict=True):
        shutil.copytree(whole.run_dir / "checkpoints" / "step-00000002", part.run_dir / "checkpoints" / "step-00000002")
    run_ranks(train, 1, [(recipe, 99) for recipe in parts])
    return folder


def content(run_dir: Path) -> dict[str, Tensor]:
    last = complete_checkpoints(run_dir)[-1]
    assert last.name == "step-00000004"
    states = {"weight": master_weights(last), "buffer": saved_buffers(last), **optimizer_states(last)}
    return {f"{kind}/{name}": value for kind, values in states.items() for name, value in values.items()}


def losses(run_dir: Path) -> list[float]:
    return [event["loss"] for event in read_events(run_dir, "step")]


@pytest.mark.parametrize("name", CHANGES)
def test_resumed_runs_end_with_the_same_bits(folder: Path, name: str) -> None:
    expected, found = content(folder / name), content(folder / f"{name} part")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    events = [[event["metrics"] for event in read_events(folder / run, "evaluation")] for run in (name, f"{name} part")]
    assert events[1] == events[0][1:]


def test_the_encoder_stays_as_it_was(folder: Path) -> None:
    first, *_, last = (master_weights(checkpoint) for checkpoint in complete_checkpoints(folder / "augmented"))
    assert all(torch.equal(value, last[f"encoder.{name}"]) for name, value in encoder().state_dict().items())
    assert all(not torch.equal(first[name], last[name]) for name in last if name.startswith("heads."))


def test_each_classifier_has_the_gradient_of_its_own_loss() -> None:
    probe = LinearProbe(encoder(), 5, [Variant(1, 1.0), Variant(2, 1.0)])
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    loss = probe(images, labels)
    loss.backward()
    x, own = probe.norm(probe.features(images)), []
    for head, width in zip(probe.heads, probe.widths, strict=True):
        assert isinstance(head, nn.Linear)
        own.append(nn.functional.cross_entropy(head(x[:, -width:]), labels))
        (expected,) = torch.autograd.grad(own[-1], [head.weight])
        torch.testing.assert_close(head.weight.grad, expected)
    assert loss.item() == pytest.approx(sum(loss.item() for loss in own) / 2)
    assert all(parameter.grad is None for parameter in probe.encoder.parameters())
    assert not any(module.training for module in [*probe.encoder.modules(), *probe.train().encoder.modules()])


def test_best_classifier_is_reported(folder: Path) -> None:
    for event in read_events(folder / "augmented", "evaluation"):
        found = event["metrics"]
        each = {name: value for name, value in found.items() if name.startswith("top1_")}
        assert each.keys() == {f"top1_stages{stages}_lr{scale}" for stages in (1, 2) for scale in (0.5, 2)}
        assert found["top1"] == max(each.values())
        assert found["top1"] <= found["top5"] <= 1


def test_cached_features_are_those_of_the_images(folder: Path, shards: Path) -> None:
    cache, index = FeatureCache(folder / "cached" / "features", 1), open_index(shards)
    probe = LinearProbe(encoder(), 18, [Variant(2, 1.0)])
    data = tiny_recipe().data
    (images, samples, _), *_ = held_out_batches(index, 64, 8, Ranks(), 0.875)
    expected = probe.features(ToDevice(torch.device("cpu"), data.mean, data.std)(images))
    torch.testing.assert_close(cache.rows(samples), expected)
    assert expected.shape == (8, probe.widths[0])
    pooled = encoder()(ToDevice(torch.device("cpu"), data.mean, data.std)(images)).mean((1, 2))
    torch.testing.assert_close(expected[:, -pooled.shape[1] :], pooled)


def test_the_best_classifier_of_the_last_stage_is_exported(folder: Path, shards: Path, tmp_path: Path) -> None:
    export(folder / "augmented", tmp_path / "model")
    assert evaluate([str(tmp_path / "model"), str(shards), "--json", str(tmp_path / "found.json")]) == 0
    measured = read_events(folder / "augmented", "evaluation")[-1]["metrics"]
    best = max(value for name, value in measured.items() if name.startswith("top1_stages1_"))
    assert json.loads((tmp_path / "found.json").read_text())["top1"] == pytest.approx(best)


def test_norm_agrees_with_torch() -> None:
    ours, theirs = FeatureNorm(6), nn.BatchNorm1d(6, eps=1e-6, affine=False)
    for _ in range(3):
        x = 3 + 2 * torch.randn(8, 6)
        torch.testing.assert_close(ours(x), theirs(x))
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.distributed
def test_two_ranks_and_then_one_compute_the_same(shards: Path, tmp_path: Path) -> None:
    """With as many images at once on all ranks together, whose statistics normalise them."""
    write_encoder_directory(tmp_path / "encoder", "mixmae_swin_nano", SIZES, encoder().state_dict())

    def recipes(run: str, micro_batch: int, until: int) -> list[tuple[Recipe, int]]:
        own = {"train.micro_batch": micro_batch}
        return [
            (recipe_for(shards, tmp_path / f"{run} {name}", **changes, **own), until)
            for name, changes in CHANGES.items()
        ]

    run_ranks(train, 2, recipes("both", 4, 2))
    run_ranks(train, 1, [*recipes("both", 8, 99), *recipes("one", 8, 99)])
    for name in CHANGES:
        one, both = tmp_path / f"one {name}", tmp_path / f"both {name}"
        assert len(losses(one)) == 4
        assert losses(both) == pytest.approx(losses(one), abs=1e-4)
        for expected, found in zip(*(read_events(run, "evaluation") for run in (one, both)), strict=True):
            assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.zero_stage": 1}, "LARS needs each as a whole; set train.zero_stage=0"),
        ({"encoder.init": None}, "encoder.init is not set"),
        ({"linear.stages": [5]}, r"linear.stages=\[5\]: mixmae_swin_nano has 4 stages"),
        ({"augment.mixup": 0.8}, "has no use for the section 'augment'"),
        ({"classification.multi_label": True}, "takes one class an image"),
    ],
)
def test_mistakes_are_one_clear_line(shards: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(recipe_for(shards, tmp_path / "run", **changes), Ranks())
