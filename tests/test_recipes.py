"""Every recipe loads, fits its own batch, and builds on the meta device."""

from pathlib import Path

import pytest
import torch

from mixmae.models.encoders.contract import Encoder
from mixmae.trainer.engine.deepspeed_engine import deepspeed_config
from mixmae.trainer.engine.schedule import build_schedule
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.tasks.registry import build_model
from tests.helpers import ROOT

RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_recipe(file: Path) -> None:
    recipe = load_recipe(file)
    with torch.device("meta"):
        model = build_model(recipe)
    if recipe.task == "pretrain" and recipe.method.name != "simmim":
        assert {"decoder_dim", "decoder_depth", "decoder_num_heads"} <= recipe.method.settings.keys()
    assert isinstance(model.encoder, Encoder)
    assert model.encoder.grid == (recipe.encoder.img_size // model.encoder.stride,) * 2
    assert build_schedule(recipe, 1_281_167).total_steps > 0
    command = file.read_text().splitlines()[0]
    assert command.startswith(("# mixmae launch ", "# make "))
    ranks = int(command.split("--local ")[1].split()[0]) if "--local" in command else 2
    config = deepspeed_config(recipe, ranks)
    assert config["gradient_accumulation_steps"] * recipe.train.micro_batch * ranks == recipe.train.global_batch
    if config["gradient_accumulation_steps"] > 1 and recipe.task != "linear":  # whose gradients are small
        assert recipe.train.zero_stage == 2, "stage 1 keeps whole gradients between micro-batches"
