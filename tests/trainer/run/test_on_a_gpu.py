"""Whole runs on a GPU, of every task: compiled and in kernels, evaluated, drawn, saved and resumed there."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmae.trainer.data.annotations import AnnotationKind
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.scenes import Scenes
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.ending import close
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import coloured_shards, run_ranks, tiny_recipe
from tests.trainer.tasks.resumed import content

KERNELS = {
    "encoder": {"img_size": 128, "embed_dim": 32, "num_heads": [1, 2, 4, 8], "window_size": [16, 16, 8, 4]},
    "train.precision": "bf16",
}
"""Heads are 32 wide; windows of 256 tokens and groups of 128 go in tiles, those of later stages as a whole."""


def recipe_for(run_dir: Path, shards: Path, **changes: Any) -> Recipe:
    settings = {
        "run_dir": str(run_dir),
        "data.shards": str(shards),
        "data.num_workers": 1,
        "train.duration": "4 steps",
        "train.micro_batch": 4,
        "checkpoint": {"every": "1 step", "keep": 10},
        "monitoring.enabled": False,
    }
    return tiny_recipe(**{**settings, **changes})


def train(ranks: Ranks, recipes: list[Recipe]) -> tuple[str, int]:
    """Each to its end, one after the other; on which device, and how much of its memory was taken."""
    for recipe in recipes:
        run = prepare(check(recipe, ranks), ranks)
        fit(run)
        close(run, clean=True)
    return ranks.device.type, torch.cuda.max_memory_allocated()


def train_deterministically(ranks: Ranks, whole: Recipe) -> None:
    """To its end; then, in the folder beside, from its second step."""
    from mixmae.trainer.engine.distributed import compute_deterministically

    compute_deterministically()
    train(ranks, [whole])
    part = whole.model_copy(update={"run_dir": Path(f"{whole.run_dir} part")})
    second = Path("checkpoints") / "step-00000002"
    shutil.copytree(whole.run_dir / second, part.run_dir / second)
    train(ranks, [part])


def require_figures(run_dir: Path, *names: str) -> None:
    assert [event["step"] for event in read_events(run_dir, "step")] == [1, 2, 3, 4]
    assert not list(read_events(run_dir, "skipped"))
    figures = [event["metrics"] for event in read_events(run_dir, "evaluation")]
    assert len(figures) == 2
    assert all(figures[-1].keys() >= {name} for name in names)
    assert len(list((run_dir / "pictures").iterdir())) == 2


@pytest.mark.gpu
def test_a_deterministic_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    shards = coloured_shards(tmp_path / "shards")
    whole = recipe_for(tmp_path / "run", shards, **{**KERNELS, "train.deterministic": True})
    run_ranks(train_deterministically, 1, whole)
    expected, found = content(whole.run_dir), content(Path(f"{whole.run_dir} part"))
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


@pytest.mark.gpu
def test_pretraining_evaluates_probes_averages_and_draws(tmp_path: Path) -> None:
    shards = coloured_shards(tmp_path / "shards")
    run_dir, measured = tmp_path / "run", {"shards": str(shards), "every": "2 steps"}
    own: dict[str, Any] = {"evaluate": {**measured, "probe": measured}}
    own |= {"optim.ema_decay": 0.9, "log.pictures": "4 steps", "train.compile": False}
    recipe = recipe_for(run_dir, shards, **{**KERNELS, **own})
    device, memory = run_ranks(train, 1, [recipe])[0]
    assert device == "cuda"
    assert memory > 0
    require_figures(run_dir, "val_loss", "probe_knn", "probe_linear")


@pytest.mark.gpu
@pytest.mark.parametrize(("task", "kind", "figure"), [("segment", "segments", "miou"), ("detect", "objects", "box_ap")])
def test_dense_tasks_train_and_evaluate(task: str, kind: AnnotationKind, figure: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("training", "held-out")):
        build_shards(Scenes(16, 96, seed, kind), tmp_path / name, shard_bytes=10**6, seed=0, jobs=1)
    sizes: dict[str, Any] = {"segmentation.width": 16} if task == "segment" else {}
    sizes |= {"detection": {"channels": 16, "rois": 32}} if task == "detect" else {}
    evaluates = task == "segment" or importlib.util.find_spec("faster_coco_eval") is not None
    if evaluates:
        sizes["evaluate"] = {"shards": str(tmp_path / "held-out"), "every": "2 steps"}
    own = {**KERNELS, "task": task, "log.pictures": "4 steps", **sizes}
    recipe = recipe_for(tmp_path / "run", tmp_path / "training", **own)
    assert run_ranks(train, 1, [recipe])[0][0] == "cuda"
    if evaluates:
        require_figures(tmp_path / "run", figure)


@pytest.mark.gpu
def test_fine_tuning_mixes_and_evaluates(tmp_path: Path) -> None:
    shards = coloured_shards(tmp_path / "shards")
    own: dict[str, Any] = {"task": "finetune", "augment": {"mixup": 0.8, "cutmix": 1.0}, "train.compile": False}
    own |= {"evaluate": {"shards": str(shards), "every": "2 steps"}, "encoder.drop_path_rate": 0.2}
    recipe = recipe_for(tmp_path / "run", shards, **{**KERNELS, **own})
    assert run_ranks(train, 1, [recipe])[0][0] == "cuda"
    figures = [event["metrics"] for event in read_events(tmp_path / "run", "evaluation")]
    assert [found.keys() >= {"val_loss", "top1"} for found in figures] == [True, True]
