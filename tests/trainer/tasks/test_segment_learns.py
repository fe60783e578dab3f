"""A nano segmenter learns the shapes of procedural scenes, sooner from a pretrained encoder; docs/segmentation.md."""

from pathlib import Path
from typing import Any

import pytest

from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.scenes import Scenes
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import run_ranks, tiny_recipe
from tests.trainer.checkpoints.test_elastic import train
from tests.trainer.tasks.resumed import Shards
from tests.trainer.tasks.test_segment import recipe_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
ENCODER: dict[str, Any] = {
    "encoder.embed_dim": 24,
    "encoder.depths": [1, 1, 2, 1],
    "encoder.num_heads": [1, 2, 4, 8],
    "encoder.window_size": [8, 8, 4, 2],
    "encoder.drop_path_rate": 0.0,
}
LARGER: dict[str, Any] = {**ENCODER, "encoder.img_size": 96, "encoder.window_size": [12, 12, 6, 3]}
"""Of nine cells, which a method can mix."""


def learning(sets: Shards, run_dir: Path, **changes: Any) -> Recipe:
    """At a learning rate of 1.5e-2: the narrower the layers, the larger the steps that their weights need."""
    return recipe_for(
        sets,
        run_dir,
        **{
            **ENCODER,
            "segmentation": {"width": 32, "scale": [1.0, 1.25]},
            "train.duration": "1500 steps",
            "train.global_batch": 32,
            "train.micro_batch": 32,
            "optim.base_lr": 0.12,
            "optim.betas": [0.9, 0.999],
            "optim.eps": 1e-8,
            "optim.warmup": "30 steps",
            "optim.clip_grad": 1.0,
            "optim.layer_decay": 1.0,
            "evaluate.every": "500 steps",
            "checkpoint": {"every": "1500 steps"},
            "log.every": 50,
            **changes,
        },
    )


def pretraining(shards: Path, run_dir: Path) -> Recipe:
    """MixMAE for 80,000 images: the loss lies still for a third of them, and falls then."""
    return tiny_recipe(
        **{
            **LARGER,
            "method": {"num_images": 2, "decoder_dim": 64, "decoder_depth": 4, "decoder_num_heads": 4},
            "data.shards": str(shards),
            "data.crop_scale": [0.9, 1.0],
            "run_dir": str(run_dir),
            "train.duration": "2500 steps",
            "train.global_batch": 32,
            "train.micro_batch": 32,
            "train.precision": "bf16",
            "optim.base_lr": 1.2e-2,
            "optim.warmup": "100 steps",
            "optim.clip_grad": 3.0,
            "checkpoint.every": "2500 steps",
            "log.every": 50,
            "monitoring.enabled": False,
        }
    )


def scenes(out: Path, count: int, size: int, seed: int) -> Path:
    build_shards(Scenes(count, size, seed, "segments"), out, shard_bytes=4_000_000, seed=0, jobs=2)
    return out


def labelled(folder: Path, size: int) -> Shards:
    return Shards(scenes(folder / "training", 3000, size, 0), scenes(folder / "held-out", 100, size, 1))


def learned(recipe: Recipe) -> float:
    """The mIoU at the end."""
    run_ranks(train, 1, [(recipe, 10_000)])
    found: float = read_events(recipe.run_dir, "evaluation")[-1]["metrics"]["miou"]
    return found


def test_it_learns_to_segment_shapes(tmp_path: Path) -> None:
    """mIoU 0.61 after 1500 steps, in 9 minutes of one thread's time."""
    assert learned(learning(labelled(tmp_path, 72), tmp_path / "run")) > 0.5


def test_it_learns_sooner_from_a_pretrained_encoder(tmp_path: Path) -> None:
    """As of seed 0 in docs/segmentation.md, for two thirds of its steps: 35 minutes of one thread's time."""
    sets, encoder = labelled(tmp_path, 108), tmp_path / "pretraining"
    run_ranks(train, 1, [(pretraining(scenes(tmp_path / "unlabelled", 30_000, 108, 7), encoder), 10_000)])
    shorter = {**LARGER, "train.duration": "500 steps", "evaluate.every": "500 steps"}
    scratch = learned(learning(sets, tmp_path / "scratch", **shorter))
    pretrained = {"encoder.init": str(encoder), "optim.layer_decay": 0.75}
    assert learned(learning(sets, tmp_path / "pretrained", **shorter, **pretrained)) > scratch + 0.02
