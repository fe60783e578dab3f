"""Every recipe loads, fits its own batch, and builds on the meta device."""

from pathlib import Path

import pytest
import torch

from trainer.config import load_recipe
from trainer.engine import build_model, deepspeed_config
from trainer.optim import build_schedule

RECIPES = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe(file: Path) -> None:
    recipe = load_recipe(file)
    with torch.device("meta"):
        model = build_model(recipe)
    assert model.grid == (recipe.model.img_size // 32,) * 2
    assert build_schedule(recipe, 1_281_167).total_steps > 0
    world_size = recipe.train.global_batch // recipe.train.micro_batch
    assert deepspeed_config(recipe, world_size)["gradient_accumulation_steps"] == 1
    head = file.read_text().split("\n\n")[0].splitlines()
    assert head[0].startswith("# "), "a recipe opens with its command"
    assert "mixmae" in head[0] or "make" in head[0]
