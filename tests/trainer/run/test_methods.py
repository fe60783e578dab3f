"""Runs by every method on every family: interrupted ones end with the same bits, and what is exported opens again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.checkpoints.weights import master_weights, saved_buffers
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.export.export import export
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.components import EncoderSection, MethodSection
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.ending import close
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import run_ranks, tiny_recipe
from tests.models.methods.teachers import small_teacher

DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
FAMILIES = {
    "swin": None,  # tiny_recipe's own
    "vit": {"embed_dim": 16, "num_heads": 2},
    "pvt": {"embed_dims": [8, 16, 20, 32]},
    "twins": {"embed_dims": [8, 12, 18, 24]},
    "resnet": {"channels": [32, 64, 96, 128], "norm_groups": 4},
}
METHODS: dict[str, dict[str, Any]] = {
    "mixmae": {"num_images": 2, **DECODER},
    "simmim": {},
    "mae": DECODER,
    "mask tokens": {"name": "mixmae", "num_images": 2, "extra_mask_ratio": 0.5, **DECODER},
    "mix embedding": {"name": "mixmae", "num_images": 2, "separate_groups": False, "mix_embedding": True, **DECODER},
    "distill": {"name": "mixmae_distill", "num_images": 2, **DECODER},
    "refine": {"num_blocks": 2, "hidden_dim": 16, "embed_dim": 8, "queue_size": 12},
}
IN_EACH_CI = [
    *(("swin", method) for method in METHODS if method != "mixmae"),
    ("vit", "mae"),
    ("twins", "mixmae"),
    ("resnet", "simmim"),
]
ALL = [*IN_EACH_CI, *((f, m) for f in FAMILIES for m in ("mixmae", "simmim") if (f, m) not in IN_EACH_CI)]


def recipe_of(family: str, method: str, stage: int, shards: Path, folder: Path) -> Recipe:
    changes = {
        "data.shards": str(shards),
        "run_dir": str(folder / f"{family}-{method.replace(' ', '_')}"),
        "train.zero_stage": stage,
        "train.precision": "bf16",
        "train.duration": "4 steps",
        "checkpoint.every": "2 steps",
        "log.pictures": "2 steps",
        "monitoring.enabled": False,
    }
    recipe = tiny_recipe(**changes)
    sizes, settings = FAMILIES[family], dict(METHODS[method])
    if method == "distill":
        settings["teacher"] = small_teacher()
    encoder = EncoderSection(name=f"mixmae_{family}_nano", img_size=64, **sizes) if sizes else recipe.encoder
    return recipe.model_copy(update={"method": MethodSection(**{"name": method, **settings}), "encoder": encoder})


def train(ranks: Ranks, recipes: list[Recipe]) -> list[int]:
    """Trains each to its end; the steps at which they began."""
    firsts = []
    for recipe in recipes:
        run = prepare(check(recipe, ranks), ranks)
        firsts.append(run.state.step)
        fit(run)
        close(run, clean=True)
    return firsts


@pytest.mark.parametrize(
    ("stage", "ranks", "combinations"),
    [
        pytest.param(1, 1, IN_EACH_CI, marks=pytest.mark.distributed),
        *(pytest.param(stage, 2, ALL[part::2], marks=pytest.mark.slow) for stage in (1, 2, 3) for part in (0, 1)),
    ],
)
def test_interrupted_runs_end_with_the_same_bits(
    shards: Path, tmp_path: Path, stage: int, ranks: int, combinations: list[tuple[str, str]]
) -> None:
    whole = [recipe_of(*names, stage, shards, tmp_path / "whole") for names in combinations]
    parts = [recipe_of(*names, stage, shards, tmp_path / "part") for names in combinations]
    run_ranks(train, ranks, whole)
    for made, cut in zip(whole, parts, strict=True):
        shutil.copytree(made.run_dir, cut.run_dir, ignore=shutil.ignore_patterns("step-00000004"))
        (cut.run_dir / "checkpoints" / "newest").write_text("step-00000002\n")
    assert run_ranks(train, ranks, parts)[0] == [2] * len(combinations)
    for made, cut in zip(whole, parts, strict=True):
        expected, actual = (master_weights(complete_checkpoints(recipe.run_dir)[-1]) for recipe in (made, cut))
        assert all(torch.equal(value, actual[name]) for name, value in expected.items()), made.run_dir.name
        before, after = (saved_buffers(complete_checkpoints(recipe.run_dir)[-1]) for recipe in (made, cut))
        assert all(torch.equal(value, after[name]) for name, value in before.items()), made.run_dir.name
        assert ("heads.0.queue" in before) == ("refine" in made.run_dir.name)
        assert not any(name.startswith("teacher.") for name in (*expected, *before))
        losses = [[event["loss"] for event in read_events(recipe.run_dir, "step")] for recipe in (made, cut)]
        assert losses[0][-2:] == losses[1][-2:]
        out = export(made.run_dir, tmp_path / "exported" / made.run_dir.name)
        encoder = timm.create_model(f"local-dir:{out}", pretrained=True)
        for name, parameter in encoder.named_parameters():
            assert torch.equal(parameter, expected[f"encoder.{name}"].float())
        backbone = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True)
        maps = backbone(torch.randn(1, 3, 64, 64))
        assert [m.shape[1] for m in maps] == backbone.feature_info.channels()
