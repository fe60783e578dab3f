"""Every recipe loads, fits its own batch, and builds on the meta device; made small, those for pretraining train."""

from pathlib import Path

import pytest
import torch

from mixmae.models.encoders.contract import Encoder
from mixmae.models.encoders.registry import family_of
from mixmae.trainer.engine.deepspeed_engine import deepspeed_config
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.schedule import build_schedule
from mixmae.trainer.recipe.library import library
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.ending import close
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.tasks.registry import build_model
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import run_ranks

RECIPES = library()
PRETRAINING = [name for name in RECIPES if name.startswith("pretrain/") and name != "pretrain/demo"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str) -> None:
    recipe = RECIPES[name]
    found = load_recipe(recipe.file, ["encoder.init=pretrained-encoder"] if name.startswith("probe/") else [])
    with torch.device("meta"):
        model = build_model(found)
    if found.task == "pretrain" and found.method.name not in ("simmim", "refine"):
        assert {"decoder_dim", "decoder_depth", "decoder_num_heads"} <= found.method.settings.keys()
    assert isinstance(model.encoder, Encoder)
    stride = family_of(found.encoder.name)[0].stride * found.encoder.settings.get("patch_size", 4) // 4
    assert model.encoder.grid == tuple(side // stride for side in found.image_shape[1:])
    assert build_schedule(found, 1_281_167).total_steps > 0
    command = recipe.head[0]
    assert command.startswith(("mixmae launch ", "make "))
    ranks = int(command.split("--local ")[1].split()[0]) if "--local" in command else 2
    config = deepspeed_config(found, ranks, "cuda")
    assert config["gradient_accumulation_steps"] * found.train.micro_batch * ranks == found.train.global_batch
    if config["gradient_accumulation_steps"] > 1 and found.task != "linear":  # whose gradients are small
        assert config["zero_optimization"]["stage"] == 2, "stage 1 keeps whole gradients between micro-batches"


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_recipe_of_the_papers_says_its_cost_and_its_result(name: str) -> None:
    head = RECIPES[name].head
    assert [line.split(":")[0] for line in head[2:4]] == [
        "Cost by 'mixmae plan' on 8 a100-80g",
        "Result by the paper",
    ]
    assert head[3].endswith("not yet repeated here.")


def made_small(name: str, shards: Path, folder: Path) -> Recipe:
    """The recipe for two steps of a few images, with the smallest encoder of its family."""
    family = load_recipe(RECIPES[name].file).encoder.name.split("_")[1]
    keys = {
        "encoder.name": f"mixmae_{family}_nano",
        "data.shards": shards,
        "data.num_workers": 0,
        "run_dir": folder / name,
        "train.duration": "2 steps",
        "train.global_batch": 5,
        "train.micro_batch": 5,
        "optim.warmup": "1 step",
        "checkpoint.every": "1000 steps",
        "log.every": 1,
        "log.pictures": "1 step",
        "monitoring.enabled": "false",
    }
    overrides = [f"{key}={value}" for key, value in keys.items()]
    if "window_size" not in load_recipe(RECIPES[name].file).encoder.settings:
        overrides.append("encoder.img_size=128")
    if load_recipe(RECIPES[name].file).method.name != "simmim":
        overrides += ["method.decoder_dim=32", "method.decoder_depth=1", "method.decoder_num_heads=2"]
    return load_recipe(RECIPES[name].file, overrides)


def train(ranks: Ranks, recipe: Recipe) -> None:
    run = prepare(check(recipe, ranks), ranks)
    fit(run)
    close(run, clean=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINING)
def test_a_recipe_trains_when_made_small(shards: Path, tmp_path: Path, name: str) -> None:
    recipe = made_small(name, shards, tmp_path)
    run_ranks(train, 1, recipe)
    losses = [event["loss"] for event in read_events(recipe.run_dir, "step")]
    assert len(losses) == 2
    assert all(0.3 < loss < 2 for loss in losses), losses
    assert list((recipe.run_dir / "pictures").iterdir())
