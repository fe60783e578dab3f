"""Detection: resumed bit for bit at every ZeRO stage, evaluated, exported, drawn; and that it learns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import complete_checkpoints
from mixmae.models.heads.mask_rcnn.detector import MaskRCNN
from mixmae.trainer.checkpoints.weights import model_weights
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.scenes import Scenes
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation.evaluate import main as evaluate
from mixmae.trainer.evaluation.predict import main as predict
from mixmae.trainer.export.export import export
from mixmae.trainer.export.task_directory import open_task_directory
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.tasks.registry import task_of
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import run_ranks, tiny_recipe
from tests.trainer.checkpoints.test_elastic import train
from tests.trainer.tasks.resumed import Shards, content, require_same_end, runs_of

KINDS = [(1, "bf16"), (2, "fp32"), (3, "fp32")]
"""ZeRO stage and precision."""


def scenes(out: Path, count: int, seed: int, size: int = 96) -> Path:
    build_shards(Scenes(count, size, seed, "objects"), out, shard_bytes=100_000, seed=0, jobs=1)
    return out


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Some images without objects; 7 held-out ones, which two ranks cannot share evenly."""
    folder = tmp_path_factory.mktemp("scenes")
    return Shards(scenes(folder / "training", 40, 0), scenes(folder / "held-out", 7, 1))


def recipe_for(sets: Shards, run_dir: Path, **changes: Any) -> Recipe:
    settings = {
        "task": "detect",
        "data.shards": str(sets.training),
        "run_dir": str(run_dir),
        "train.duration": "4 steps",
        "train.global_batch": 4,
        "train.micro_batch": 2,
        "encoder.drop_path_rate": 0.2,
        "detection": {"channels": 16, "rois": 32, "scale": [0.3, 2.0]},
        "optim.layer_decay": 0.85,
        "optim.eps": 1e-4,  # below it are gradients that are rounding errors, which AdamW would make steps of
        "optim.schedule": "step",
        "optim.milestones": [0.5],
        "evaluate": {"shards": str(sets.held_out), "every": "2 steps"},
        "checkpoint": {"every": "1 step", "keep": 10},
        "log.pictures": "4 steps",
        "monitoring.enabled": False,
    }
    return tiny_recipe(**{**settings, **changes})


@pytest.fixture(scope="module")
def runs(sets: Shards, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    return runs_of(tmp_path_factory.mktemp("detectors"), recipe_for, sets, KINDS)


def test_gradients_of_no_fixed_order_are_not_promised_to_have_one() -> None:
    recipe = tiny_recipe(task="detect", **{"train.deterministic": True, "detection.num_classes": 3})
    with pytest.raises(UsageError, match=r"train.deterministic=true: .* RoIAlign .* set it to false"):
        task_of(recipe)


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_resumed_runs_end_with_the_same_bits(runs: Callable[[int, str], Path], stage: int, precision: str) -> None:
    whole, part = runs(stage, precision), Path(f"{runs(stage, precision)} part")
    expected, found = content(whole), content(part)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    events = [[event["metrics"] for event in read_events(run, "evaluation")] for run in (whole, part)]
    assert events[1] == events[0][1:]
    assert events[0][0].keys() >= {"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"}
    first, last = (whole / "pictures").iterdir()
    assert {first.name, last.name} == {"step-00000001.png", "step-00000004.png"}
    assert Image.open(last).size[0] > 2 * 64


@pytest.mark.distributed
def test_a_preempted_run_goes_on_as_if_nothing_had_happened(runs: Callable[[int, str], Path]) -> None:
    require_same_end(runs(*KINDS[-1]), content)


@pytest.mark.distributed
def test_every_stage_computes_the_same(runs: Callable[[int, str], Path]) -> None:
    losses = {kind: [event["loss"] for event in read_events(runs(*kind), "step")] for kind in KINDS}
    expected = losses[2, "fp32"]
    assert len(expected) == 4
    assert losses[3, "fp32"] == pytest.approx(expected, rel=1e-4)
    assert losses[1, "bf16"] == pytest.approx(expected, rel=0.1)


@pytest.mark.distributed
def test_an_export_is_a_detector_that_finds_what_the_run_did(
    runs: Callable[[int, str], Path], sets: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = runs(2, "fp32")
    export(run_dir, tmp_path / "detector")
    task, module = open_task_directory(tmp_path / "detector", torch.device("cpu"))
    weights = model_weights(complete_checkpoints(run_dir)[-1])
    assert all(torch.equal(value, weights[name]) for name, value in module.named_parameters())
    again = task_of(task.recipe.model_copy(update={"evaluate": recipe_for(sets, run_dir).evaluate}))
    with torch.no_grad():
        metrics = again.evaluate(module, Ranks(), lambda: None)
    assert metrics == pytest.approx(read_events(run_dir, "evaluation")[-1]["metrics"], abs=1e-6)
    evaluate([str(tmp_path / "detector"), str(sets.held_out), "--json", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text()) == pytest.approx(metrics, abs=1e-6)
    shown = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["box_ap", "mask_ap", "class"] for line in shown)
    assert any(line.split()[-1:] == ["square"] for line in shown)
    assert "object-detection" in (tmp_path / "detector" / "README.md").read_text()

    index = open_index(sets.held_out)
    for name, sample in (("a.jpg", 0), ("b.jpg", 1)):
        (tmp_path / name).write_bytes(index.read(sample))
    assert isinstance(module, MaskRCNN)
    torch.nn.init.normal_(module.box_head.score.weight, std=0.1)  # so that something is found
    save_file(module.state_dict(), tmp_path / "detector" / "model.safetensors")
    arguments = [str(tmp_path / part) for part in ("detector", "a.jpg", "b.jpg")] + ["--out", str(tmp_path / "drawn")]
    assert predict([*arguments, "--json", "--min-score", "0.05"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(0.05 < one["score"] <= 1 and one["class"] in index.classes for part in found for one in part["objects"])
    assert any(part["objects"] for part in found)
    assert Image.open(tmp_path / "drawn" / "a.png").size == Image.open(tmp_path / "a.jpg").size
    for score, objects in ((0.2, [sum(one["score"] >= 0.2 for one in part["objects"]) for part in found]), (1, [0, 0])):
        assert predict([*arguments, "--min-score", str(score)]) == 0
        lines, each = capsys.readouterr().out.splitlines(), [count or 1 for count in objects]
        assert lines[each[0] + 1].endswith(str(tmp_path / "drawn" / "b.png"))
        assert len(lines) == sum(each) + 2
        assert ("nothing with a score" in lines[1]) == (objects[0] == 0)
    with pytest.raises(UsageError, match="--out FOLDER"):
        predict(arguments[:2])


@pytest.mark.distributed
def test_other_ranks_and_stages_continue_as_if_nothing_had_changed(sets: Shards, tmp_path: Path) -> None:
    changed, whole = tmp_path / "changed", recipe_for(sets, tmp_path / "whole", **{"train.zero_stage": 2})
    for ranks, stage, until in [(2, 2, 2), (1, 3, 3), (2, 3, 4)]:
        run_ranks(train, ranks, [(recipe_for(sets, changed, **{"train.zero_stage": stage}), until)])
    run_ranks(train, 1, [(whole, 99)])
    losses = [[event["loss"] for event in read_events(run, "step")] for run in (changed, whole.run_dir)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    metrics = [read_events(run, "evaluation")[-1]["metrics"] for run in (changed, whole.run_dir)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "mixmae", "num_images": 3}}, "no use for the section 'method'"),
        ({"evaluate.shards": "nowhere"}, "shard directory nowhere does not exist"),
        ({"encoder.init": "nowhere"}, "nowhere/model.safetensors does not exist"),
        ({"detection": {"num_classes": 3}}, "num_classes=3, but there are 6 classes"),
        ({"detection": {"classes": ["cat", "dog"]}}, "and the detector 2 .cat, dog.; build the shards with the same"),
    ],
)
def test_mistakes_are_one_clear_line(sets: Shards, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check(recipe_for(sets, tmp_path / "run", **changes), Ranks())
    assert "\n" not in str(caught.value)


def test_shards_without_objects_are_refused(shards: Path, sets: Shards, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs shards with objects"):
        check(recipe_for(Shards(shards, sets.held_out), tmp_path / "run"), Ranks())


def test_one_class_is_enough() -> None:
    recipe = tiny_recipe(**{"task": "detect", "detection": {"num_classes": 1, "channels": 16, "rois": 32}})
    task = task_of(recipe)
    detector = task.build()
    loss = detector(torch.zeros(1, 3, 64, 64), *task.example_inputs(detector, 1))
    assert loss.isfinite()


LEARNING: dict[str, Any] = {
    "encoder": {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "drop_path_rate": 0.0},
    "detection": {"channels": 32, "rois": 32, "scale": [0.8, 1.25]},
    "train.duration": "1000 steps",
    "train.global_batch": 8,
    "train.micro_batch": 8,
    "train.zero_stage": 1,
    "optim.base_lr": 6.4e-2,
    "optim.eps": 1e-8,
    "optim.warmup": "50 steps",
    "optim.milestones": [0.8],
    "optim.clip_grad": 1.0,
    "optim.layer_decay": 1.0,
    "evaluate.every": "1000 steps",
    "checkpoint.every": "1000 steps",
    "log.every": 20,
    "log.pictures": None,
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_learns_to_find_shapes(tmp_path: Path) -> None:
    """From random weights: box AP50 0.67 and mask AP50 0.57 after 1000 steps."""
    learned = Shards(scenes(tmp_path / "training", 500, 0, 64), scenes(tmp_path / "held-out", 40, 1, 64))
    recipe = recipe_for(learned, tmp_path / "run", **LEARNING)
    run_ranks(train, 1, [(recipe, 10_000)])
    metrics = read_events(recipe.run_dir, "evaluation")[-1]["metrics"]
    assert metrics["box_ap50"] > 0.5
    assert metrics["mask_ap50"] > 0.4
