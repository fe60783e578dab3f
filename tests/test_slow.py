"""What takes minutes: the demo over seeds, Swin-H itself, and compiled blocks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixmae.trainer.telemetry.events import read_events
from tests.helpers import ROOT, run_ranks, tiny_recipe
from tests.trainer.engine.test_zero import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_the_demo_learned_is_worth_having(tmp_path: Path, seed: int) -> None:
    command = [sys.executable, "-m", "mixmae.launch.cli", "demo", "--out", str(tmp_path / "demo"), "--seed", str(seed)]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((tmp_path / "demo" / "encoder" / "probe.json").read_text())
    assert found["pretrained"]["linear"] > found["untrained"]["linear"] + 0.2
    assert found["pretrained"]["knn"] > found["untrained"]["knn"] + 0.05
    finetuned, scratch = (
        read_events(tmp_path / "demo" / name, "evaluation")[-1]["metrics"]["top1"]
        for name in ("finetuned", "from-scratch")
    )
    assert finetuned > scratch + 0.1


def test_swin_huge_takes_steps_with_fewer_pixels(shards: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "mixmae.trainer.train", "configs/pretrain/swin_huge.yaml", f"data.shards={shards}",
         f"run_dir={tmp_path / 'run'}", "encoder.img_size=64", "encoder.window_size=[16,8,4,2]", "method.num_images=2",
         "data.num_workers=0", "train.global_batch=2", "train.micro_batch=2", "train.duration=3 steps",
         "optim.warmup=1 step", "checkpoint.every=1000 steps", "log.every=1", "log.pictures=null"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    losses = [event["loss"] for event in read_events(tmp_path / "run", "step")]
    assert len(losses) == 3
    assert all(0.9 < loss < 1.5 for loss in losses)


def test_compiled_blocks_give_the_same_losses(shards: Path, tmp_path: Path) -> None:
    recipes = [
        tiny_recipe(**{"data.shards": str(shards), "run_dir": str(tmp_path / str(on)), "train.compile": on,
                       "train.precision": "bf16", "train.activation_checkpointing": {"kind": kind}})
        for on, kind in ((False, "none"), (True, "none"), (True, "torch"))
    ]  # fmt: skip
    losses: list[list[float]] = []
    for recipe in recipes:
        run_ranks(train, 1, [recipe.model_copy(update={"run_dir": tmp_path / str(len(losses))})])
        losses.append([event["loss"] for event in read_events(tmp_path / str(len(losses)), "step")])
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)
    assert losses[2] == pytest.approx(losses[0], abs=5e-3)
