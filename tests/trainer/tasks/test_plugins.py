"""An encoder and a method from outside the package, used as any other: trained, resumed, exported, watched."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mixmae
from mixmae.base.errors import UsageError
from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.checkpoints.weights import master_weights, optimizer_states
from mixmae.trainer.export.export import export
from mixmae.trainer.recipe.loading import parse_recipe
from mixmae.trainer.tasks.registry import task_of
from mixmae.trainer.telemetry.events import read_events
from tests.warm import run_module

TOY: dict[str, Any] = {
    "plugins": ["tests.plugins.toy"],
    "encoder": {"name": "toy_patches", "img_size": 64, "embed_dim": 8},
    "method": {"name": "toy_colour", "noise": 0.2},
    "data": {"num_workers": 0},
    "train": {"duration": "6 steps", "global_batch": 8, "micro_batch": 4, "precision": "bf16"},
    "optim": {"base_lr": 3e-2, "warmup": "1 step"},
    "checkpoint": {"every": "3 steps"},
    "log": {"every": 1, "pictures": "6 steps"},
}


def train(tmp_path: Path, name: str, shards: Path, **train: Any) -> Path:
    recipe = {**TOY, "run_dir": str(tmp_path / name), "train": {**TOY["train"], **train}}
    recipe["data"] = {**TOY["data"], "shards": str(shards)}
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    done = run_module("mixmae.trainer.train", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / name


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("toy"), "whole", shards)


def test_a_plugin_trains_and_is_watched(trained: Path) -> None:
    losses = [event["loss"] for event in read_events(trained, "step")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert len(list((trained / "pictures").glob("*.png"))) == 2
    (start,) = read_events(trained, "start")
    assert "toy_patches by toy_colour" in start["message"]


def test_a_plugin_resumes_bit_for_bit(trained: Path, shards: Path, tmp_path: Path) -> None:
    halves = train(tmp_path, "halves", shards)
    last, first = complete_checkpoints(halves)[-1], complete_checkpoints(halves)[0]
    (last.parent / "newest").write_text(first.name)
    train(tmp_path, "halves", shards)
    contents = [complete_checkpoints(run)[-1] for run in (trained, halves)]
    for states in zip(*({"weight": master_weights(c), **optimizer_states(c)}.items() for c in contents), strict=True):
        (kind, expected), (_, found) = states
        assert all(torch.equal(value, found[name]) for name, value in expected.items()), kind


def test_a_plugin_is_exported_and_loaded(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "encoder")
    encoder = mixmae.load_encoder(tmp_path / "encoder", num_classes=0)
    weights = master_weights(complete_checkpoints(trained)[-1])
    assert all(torch.equal(value, weights[f"encoder.{name}"]) for name, value in encoder.state_dict().items())
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plugins": ["nothing.there"]}, "'nothing.there' cannot be imported"),
        ({"method": {"name": "toy_color"}}, "did you mean 'toy_colour'"),
        ({"method": {"name": "toy_colour", "noises": 1}}, "did you mean 'method.noise'"),
        ({"method": {"name": "toy_colour", "noise": "loud"}}, "method.noise='loud': expected a number"),
        ({"encoder": {"name": "toy_patches", "depths": [1]}}, "unknown key 'encoder.depths'; known: embed_dim"),
        ({"task": "pretrian"}, "did you mean 'pretrain'"),
    ],
)
def test_what_a_component_does_not_have_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        task_of(parse_recipe({**TOY, **change}, "toy"))
    assert message in str(caught.value)
