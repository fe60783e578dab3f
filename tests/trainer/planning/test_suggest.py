"""What is suggested is a recipe that starts, on any number of GPUs and images."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from mixmae.base.errors import UsageError
from mixmae.launch.commands import recipes
from mixmae.trainer.planning.suggest import LADDER, MOST_BATCH, MOST_EPOCHS, STEPS_AN_EPOCH, nested, suggest
from mixmae.trainer.recipe.loading import load_recipe


@given(st.integers(64, 20_000_000), st.integers(1, 64), st.floats(1, 1e6))
def test_any_suggestion_can_be_started(images: int, gpus: int, affordable: float) -> None:
    assume(images >= 8 * gpus)
    found = suggest(images, gpus, affordable=affordable)
    recipe = found.recipe("a: b")
    recipe.streams_of(gpus - 1, gpus)
    assert recipe.data.shards == "a: b"
    assert recipe.accumulation(gpus) >= 1
    assert recipe.train.zero_stage == "auto"
    assert recipe.train.global_batch <= max(MOST_BATCH, 8 * gpus)
    assert recipe.train.global_batch <= max(images / STEPS_AN_EPOCH, 8 * gpus)
    assert recipe.train.duration.amount <= min(MOST_EPOCHS, affordable)
    assert recipe.optim.warmup.amount <= recipe.train.duration.amount / 10
    lr = recipe.optim.base_lr * recipe.train.global_batch / 256
    assert lr == pytest.approx(6e-4 * math.sqrt(recipe.train.global_batch / MOST_BATCH), rel=5e-3)


def test_more_images_get_larger_encoders() -> None:
    sizes = [suggest(images, 8).size for images in (1_500, 20_000, 150_000, 1_281_167, 14_000_000)]
    assert sizes == list(LADDER)
    with pytest.raises(UsageError, match="5 images are fewer than the 8 of one step on 1 GPUs"):
        suggest(5, 1)


def test_keys_of_a_plan_are_nested() -> None:
    keys = ["train.micro_batch=8", "train.activation_checkpointing.kind=torch", "train.micro_batch=16"]
    assert nested(keys) == {"train": {"micro_batch": 16, "activation_checkpointing": {"kind": "torch"}}}


@pytest.mark.parametrize("options", [[], ["--gpu", "rtx4090", "--hours", "100"]])
def test_a_suggestion_for_shards(
    shards: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipes.main(["suggest", str(shards), "--gpus", "2", *options]) == 0
    text = capsys.readouterr().out
    (tmp_path / "suggested.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "suggested.yaml")
    assert (recipe.encoder.name, recipe.data.shards) == ("mixmae_swin_nano", str(shards))
    assert recipe.accumulation(2) == 1
    assert recipe.train.duration.amount == 1600 if not options else recipe.train.duration.amount > 100
    commented = [number for number, line in enumerate(text.splitlines()) if line.startswith("  #")]
    assert len(commented) == 8
    assert ("# About" in text) == bool(options)
    assert yaml.safe_load(text)["train"]["global_batch"] == 16


def test_hours_need_a_gpu(shards: Path) -> None:
    with pytest.raises(UsageError, match="--hours 3 needs --gpu"):
        recipes.main(["suggest", str(shards), "--gpus", "2", "--hours", "3"])
