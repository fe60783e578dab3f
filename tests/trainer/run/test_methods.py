"""Runs by every method: interrupted ones end with the same bits, and what is exported opens again."""

import shutil
from pathlib import Path

import pytest
import timm
import torch

from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.checkpoints.weights import master_weights
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.export.export import export
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.components import EncoderSection, MethodSection
from mixmae.trainer.run.lifecycle import check, prepare
from mixmae.trainer.run.loop import fit
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import run_ranks, tiny_recipe

DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
NANO = {"name": "mixmae_vit_nano", "img_size": 64, "embed_dim": 16, "num_heads": 2}
METHODS = {
    "simmim": (None, MethodSection(name="simmim")),
    "mae": (None, MethodSection(name="mae", **DECODER)),
    "mae on vit": (EncoderSection(**NANO), MethodSection(name="mae", **DECODER)),
    "mask tokens": (None, MethodSection(name="mixmae", num_images=2, extra_mask_ratio=0.5, **DECODER)),
    "mix embedding": (
        None,
        MethodSection(name="mixmae", num_images=2, separate_groups=False, mix_embedding=True, **DECODER),
    ),
}


def recipe_of(name: str, stage: int, shards: Path, folder: Path) -> Recipe:
    changes = {
        "data.shards": str(shards),
        "run_dir": str(folder / name.replace(" ", "_")),
        "train.zero_stage": stage,
        "train.precision": "bf16",
        "train.duration": "4 steps",
        "checkpoint.every": "2 steps",
        "log.pictures": "2 steps",
    }
    recipe = tiny_recipe(**changes)
    encoder, method = METHODS[name]
    return recipe.model_copy(update={"method": method, "encoder": encoder or recipe.encoder})


def train(ranks: Ranks, recipes: list[Recipe]) -> list[int]:
    """Trains each to its end; the steps at which they began."""
    firsts = []
    for recipe in recipes:
        run = prepare(check(recipe, ranks), ranks)
        firsts.append(run.state.step)
        fit(run)
        run.reporter.close()
        run.engine.destroy()
    return firsts


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        pytest.param(1, 1, marks=pytest.mark.distributed),
        pytest.param(2, 2, marks=pytest.mark.slow),
        pytest.param(3, 2, marks=pytest.mark.slow),
    ],
)
def test_interrupted_runs_end_with_the_same_bits(shards: Path, tmp_path: Path, stage: int, ranks: int) -> None:
    whole = [recipe_of(name, stage, shards, tmp_path / "whole") for name in METHODS]
    parts = [recipe_of(name, stage, shards, tmp_path / "part") for name in METHODS]
    run_ranks(train, ranks, whole)
    for made, cut in zip(whole, parts, strict=True):
        shutil.copytree(made.run_dir, cut.run_dir, ignore=shutil.ignore_patterns("step-00000004"))
        (cut.run_dir / "checkpoints" / "newest").write_text("step-00000002\n")
    assert run_ranks(train, ranks, parts)[0] == [2] * len(METHODS)
    for made, cut in zip(whole, parts, strict=True):
        expected, actual = (master_weights(complete_checkpoints(recipe.run_dir)[-1]) for recipe in (made, cut))
        assert all(torch.equal(value, actual[name]) for name, value in expected.items()), made.method.name
        losses = [[event["loss"] for event in read_events(recipe.run_dir, "step")] for recipe in (made, cut)]
        assert losses[0][-2:] == losses[1][-2:]
        out = export(made.run_dir, tmp_path / "exported" / made.run_dir.name)
        encoder = timm.create_model(f"local-dir:{out}", pretrained=True)
        for name, parameter in encoder.named_parameters():
            assert torch.equal(parameter, expected[f"encoder.{name}"].float())
        backbone = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True)
        maps = backbone(torch.randn(1, 3, 64, 64))
        assert [m.shape[1] for m in maps] == backbone.feature_info.channels()
