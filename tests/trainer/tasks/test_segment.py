"""Segmentation: resumed bit for bit at every ZeRO stage, evaluated as by hand, exported, drawn, started from runs."""

import io
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import complete_checkpoints
from mixmae.models import create_encoder
from mixmae.models.contract import TrainableEncoder
from mixmae.models.heads import upernet
from mixmae.models.heads.upernet import Segmenter
from mixmae.trainer.checkpoints.weights import model_weights, saved_buffers
from mixmae.trainer.data.dense.held_out import held_out_scenes
from mixmae.trainer.data.dense.resizing import fit_over
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.scenes import Scenes
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation.predict import main as predict
from mixmae.trainer.evaluation.segmentation import class_names, segment_image
from mixmae.trainer.export.encoder_directory import write_encoder_directory
from mixmae.trainer.export.export import export
from mixmae.trainer.export.task_directory import open_task_directory
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.components import EncoderSection
from mixmae.trainer.run.checking import check
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import run_ranks, tiny_recipe
from tests.trainer.checkpoints.test_elastic import train
from tests.trainer.tasks import resumed
from tests.trainer.tasks.resumed import Shards, require_same_end, runs_of

KINDS = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
"""ZeRO stage and precision: each of DeepSpeed's optimizers once."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Held out are five scenes, which two ranks cannot share evenly."""
    found = Shards(*(tmp_path_factory.mktemp("scenes") / name for name in ("training", "held-out")))
    for seed, (out, count) in enumerate(zip(found, (24, 5), strict=True)):
        build_shards(Scenes(count, 96, seed, "segments"), out, shard_bytes=60_000, seed=0, jobs=1)
    return found


def recipe_for(sets: Shards, run_dir: Path, **changes: Any) -> Recipe:
    """With all that is random about training a segmenter."""
    settings = {
        "task": "segment",
        "segmentation.width": 16,
        "data.shards": str(sets.training),
        "run_dir": str(run_dir),
        "train.duration": "4 steps",
        "train.micro_batch": 4,
        "encoder.drop_path_rate": 0.2,
        "optim.layer_decay": 0.7,
        "optim.schedule": "poly",
        "optim.base_lr": 0.05,
        "optim.eps": 1e-4,  # below it are gradients that are rounding errors, which AdamW would make steps of
        "evaluate": {"shards": str(sets.held_out), "every": "2 steps"},
        "checkpoint": {"every": "1 step", "keep": 10},
        "monitoring.enabled": False,
    }
    return tiny_recipe(**{**settings, **changes})


@pytest.fixture(scope="module")
def run(sets: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of two steps."""
    run_dir = tmp_path_factory.mktemp("segmented") / "run"
    changes = {"train.duration": "2 steps", "optim.warmup": "1 step", "train.zero_stage": 2, "log.pictures": "2 steps"}
    run_ranks(train, 1, [(recipe_for(sets, run_dir, **changes), 99)])
    return run_dir


@pytest.fixture(scope="module")
def runs(sets: Shards, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    return runs_of(tmp_path_factory.mktemp("segmented"), recipe_for, sets, KINDS)


def content(run_dir: Path) -> dict[str, Tensor]:
    """Weights, buffers and optimizer states of the last checkpoint."""
    return resumed.content(run_dir, lambda checkpoint: {"buffer": saved_buffers(checkpoint)})


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [event["metrics"] for event in read_events(run_dir, "evaluation")]


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_resumed_runs_end_with_the_same_bits(runs: Callable[[int, str], Path], stage: int, precision: str) -> None:
    whole, part = runs(stage, precision), Path(f"{runs(stage, precision)} part")
    expected, found = content(whole), content(part)
    assert "buffer/head.fuse.1.running_mean" in expected
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert metrics(part) == metrics(whole)[1:]


@pytest.mark.distributed
def test_a_preempted_run_goes_on_as_if_nothing_had_happened(runs: Callable[[int, str], Path]) -> None:
    require_same_end(runs(*KINDS[-1]), content)


@pytest.mark.distributed
def test_every_stage_computes_the_same(runs: Callable[[int, str], Path]) -> None:
    """With gradients whose norm is more than 1, to which DeepSpeed clips unless it is told not to."""
    steps = {kind: read_events(runs(*kind), "step") for kind in KINDS}
    losses = {kind: [event["loss"] for event in events] for kind, events in steps.items()}
    expected = losses[0, "fp32"]
    assert len(expected) == 4
    assert max(event["grad_norm"] for event in steps[0, "fp32"]) > 1.5
    for kind, found in losses.items():
        assert found == pytest.approx(expected, abs=1e-4 if kind[1] == "fp32" else 5e-3)


@pytest.mark.distributed
def test_an_exported_segmenter_scores_as_the_run_said(run: Path, sets: Shards, tmp_path: Path) -> None:
    export(run, tmp_path / "segmenter")
    task, module = open_task_directory(tmp_path / "segmenter", torch.device("cpu"))
    assert isinstance(module, Segmenter)
    weights = model_weights(complete_checkpoints(run)[-1])
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    index, pairs = open_index(sets.held_out), []
    for scene in held_out_scenes(index, Ranks(), partial(fit_over, window=(64, 64))):
        image = torch.from_numpy(np.array(Image.open(io.BytesIO(index.read(scene.sample))))).permute(2, 0, 1)
        found = segment_image(module, image, task.recipe, torch.device("cpu")).numpy()
        pairs.append((np.asarray(scene.annotation), found))
    names = class_names(task.recipe)
    right = {name: sum(((a == n) & (b == n)).sum() for a, b in pairs) for n, name in enumerate(names)}
    either = {name: sum(((a == n) | (b == n)).sum() for a, b in pairs) for n, name in enumerate(names)}
    expected = {f"iou/{name}": right[name] / either[name] for name in names if either[name]}
    said = metrics(run)[-1]
    assert {name: value for name, value in said.items() if "/" in name} == pytest.approx(expected, abs=1e-3)
    assert said["miou"] == pytest.approx(np.mean(list(expected.values())), abs=1e-3)
    assert said["pixel_accuracy"] == pytest.approx(sum(right.values()) / sum(a.size for a, _ in pairs), abs=1e-3)


@pytest.mark.distributed
def test_predictions_are_drawn_and_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(run, tmp_path / "segmenter")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    assert predict([str(tmp_path / "segmenter"), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 0
    drawn = Image.open(tmp_path / "out" / "photo.png")
    assert drawn.size == (130, 50)
    assert (np.asarray(drawn) != pixels).any()
    assert "%" in capsys.readouterr().out


@pytest.mark.distributed
def test_runs_and_exports_are_what_others_start_from(
    run: Path, sets: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the encoder alone: another segmenter, and a pretraining, whose final norm a segmenter has not."""
    export(run, tmp_path / "segmenter")
    weights = model_weights(complete_checkpoints(run)[-1])
    expected = {k.removeprefix("backbone.encoder."): v for k, v in weights.items() if k.startswith("backbone.encoder.")}
    pretraining = tiny_recipe(**{"data.shards": str(sets.training), "run_dir": str(tmp_path / "pretraining")})
    for source in (run, tmp_path / "segmenter"):
        for recipe in (recipe_for(sets, tmp_path / "another"), pretraining):
            encoder = recipe.encoder.model_copy(update={"init": source})
            with caplog.at_level(logging.INFO):
                model = check(recipe.model_copy(update={"encoder": encoder}), Ranks()).model
            assert isinstance(model, TrainableEncoder)
            found = model.get_submodule(model.encoder_path).state_dict()
            assert all(torch.equal(found[name], value) for name, value in expected.items())
            assert "the encoder is loaded, without auxiliary, head, norms" in caplog.text
            assert ("final norm" in caplog.text) == (recipe is pretraining)
            caplog.clear()


@pytest.mark.distributed
def test_pictures_have_what_is_there_beside_what_is_found(run: Path) -> None:
    picture = Image.open(run / "pictures" / "step-00000002.png")
    assert picture.width == 3 * 64 + 2 * 4
    columns = np.asarray(picture)[14:]
    assert (columns[:64, :64] != columns[:64, 68:132]).any()


def test_a_run_starts_from_a_pretrained_encoder_of_another_size(sets: Shards, tmp_path: Path) -> None:
    sizes = tiny_recipe().encoder.settings
    pretrained = create_encoder("mixmae_swin_nano", img_size=64, **sizes).state_dict()
    write_encoder_directory(tmp_path / "pretrained", "mixmae_swin_nano", {"img_size": 64, **sizes}, pretrained)
    larger = {**sizes, "img_size": 128, "window_size": [8, 8, 4, 4], "wide_window": 8, "wide_blocks": [1]}
    encoder = {"name": "mixmae_swin_nano", **larger, "pretrain_img_size": 64, "init": str(tmp_path / "pretrained")}
    recipe = recipe_for(sets, tmp_path / "run", encoder=encoder)
    model = check(recipe, Ranks()).model
    found, name = model.state_dict(), "stages.1.blocks.0.mlp.fc1.weight"
    assert torch.equal(found[f"backbone.encoder.{name}"], pretrained[name])
    assert found["backbone.encoder.stages.2.blocks.0.attn.relative_position_bias_table"].shape == (15**2, 2)


def train_without_dropout(ranks: Ranks, plan: list[tuple[Recipe, int]]) -> None:
    """Masks are drawn for micro-batches, of which one rank has fewer and larger ones."""
    upernet._DROPOUT = 0.0
    train(ranks, plan)


@pytest.mark.distributed
def test_other_ranks_and_stages_continue_as_if_nothing_had_changed(sets: Shards, tmp_path: Path) -> None:
    """With as many images at once on all ranks together, whose statistics normalise them."""

    def recipe(run: str, ranks: int, stage: int) -> Recipe:
        changes = {"train.zero_stage": stage, "train.micro_batch": 8 // ranks, "encoder.drop_path_rate": 0.0}
        return recipe_for(sets, tmp_path / run, **changes)

    for ranks, stage, until in [(2, 2, 2), (1, 3, 3), (2, 3, 4)]:
        run_ranks(train_without_dropout, ranks, [(recipe("changed", ranks, stage), until)])
    run_ranks(train_without_dropout, 1, [(recipe("whole", 1, 0), 99)])
    changed, whole = tmp_path / "changed", tmp_path / "whole"
    losses = [[event["loss"] for event in read_events(run, "step")] for run in (changed, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for figures, of_whole in zip(metrics(changed), metrics(whole), strict=True):
        assert figures == pytest.approx(of_whole, abs=2e-3)
    expected, found = content(whole), content(changed)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "simmim"}}, "no use for the section 'method'"),
        ({"train.micro_batch": 1}, "raise it to 2"),
        ({"evaluate.shards": "nowhere"}, "shard directory nowhere does not exist"),
        ({"segmentation.num_classes": 3}, "num_classes=3, but there are 7 classes by name"),
        ({"segmentation.scale": [2.0, 0.5]}, "expected 0 < low <= high"),
    ],
)
def test_mistakes_are_one_clear_line(sets: Shards, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check(recipe_for(sets, tmp_path / "run", **changes), Ranks())
    assert "\n" not in str(caught.value)


def test_an_encoder_of_one_stride_is_refused(sets: Shards, tmp_path: Path) -> None:
    encoder = EncoderSection(name="mixmae_vit_nano", img_size=64)
    with pytest.raises(UsageError, match=r"encoder.name=mixmae_vit_nano: .* expected a hierarchical encoder"):
        check(recipe_for(sets, tmp_path / "run").model_copy(update={"encoder": encoder}), Ranks())


def test_label_maps_with_fewer_classes_are_told_what_makes_them_equal(sets: Shards, tmp_path: Path) -> None:
    classes = {"segmentation": {"classes": ["background", "disc"]}}
    with pytest.raises(UsageError, match=r"7 classes .*, and the segmenter 2 \(background, disc\).*--class-names FILE"):
        check(recipe_for(sets, tmp_path / "run", **classes), Ranks())


def test_shards_without_label_maps_are_refused(sets: Shards, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs shards with segments"):
        check(recipe_for(sets, tmp_path / "run", **{"evaluate.shards": str(shards)}), Ranks())
