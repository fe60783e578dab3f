"""Fine-tuning: resumed bit for bit at every ZeRO stage, evaluated, averaged, exported, and started from runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import complete_checkpoints
from mixmae.models.heads.classification import Classifier
from mixmae.trainer.checkpoints.weights import averaged_weights, master_weights, model_weights
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.synthetic import CLASSES, Synthetic
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation.held_out import held_out_batches
from mixmae.trainer.export.export import export
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.tasks.registry import build_model, task_of
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import run_ranks, tiny_recipe
from tests.trainer.checkpoints.test_elastic import train
from tests.trainer.tasks import resumed
from tests.trainer.tasks.resumed import Shards, require_same_end, runs_of

KINDS = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
"""ZeRO stage and precision: each of DeepSpeed's optimizers once."""


@pytest.fixture(scope="module")
def sets(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    held_out = tmp_path_factory.mktemp("held-out") / "shards"
    build_shards(Synthetic(11, 72, seed=1), held_out, shard_bytes=60_000, seed=0, jobs=1)
    return Shards(shards, held_out)


def recipe_for(sets: Shards, run_dir: Path, **changes: Any) -> Recipe:
    """With all that is random about fine-tuning."""
    settings = {
        "task": "finetune",
        "data.shards": str(sets.training),
        "data.crop_scale": [0.08, 1.0],
        "run_dir": str(run_dir),
        "train.duration": "4 steps",
        "train.micro_batch": 4,
        "encoder.drop_path_rate": 0.2,
        "optim.layer_decay": 0.7,
        "optim.eps": 1e-4,  # below it are gradients that are rounding errors, which AdamW would make steps of
        "optim.ema_decay": 0.9,
        "augment": {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1"},
        "classification.label_smoothing": 0.1,
        "evaluate": {"shards": str(sets.held_out), "every": "2 steps"},
        "checkpoint": {"every": "1 step", "keep": 10},
        "monitoring.enabled": False,
    }
    return tiny_recipe(**{**settings, **changes})


@pytest.fixture(scope="module")
def runs(sets: Shards, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    return runs_of(tmp_path_factory.mktemp("finetuned"), recipe_for, sets, KINDS)


def content(run_dir: Path) -> dict[str, Tensor]:
    """Weights, their average and optimizer states of the last checkpoint."""
    return resumed.content(run_dir, lambda checkpoint: {"ema": averaged_weights(checkpoint)})


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_resumed_runs_end_with_the_same_bits(runs: Callable[[int, str], Path], stage: int, precision: str) -> None:
    whole, part = runs(stage, precision), Path(f"{runs(stage, precision)} part")
    expected, found = content(whole), content(part)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    events = [[event["metrics"] for event in read_events(run, "evaluation")] for run in (whole, part)]
    assert events[1] == events[0][1:]


@pytest.mark.distributed
def test_a_preempted_run_goes_on_as_if_nothing_had_happened(runs: Callable[[int, str], Path]) -> None:
    require_same_end(runs(*KINDS[-1]), content)


@pytest.mark.distributed
def test_every_stage_computes_the_same(runs: Callable[[int, str], Path]) -> None:
    losses = {kind: [event["loss"] for event in read_events(runs(*kind), "step")] for kind in KINDS}
    expected = losses[0, "fp32"]
    assert len(expected) == 4
    for kind, found in losses.items():
        assert found == pytest.approx(expected, abs=1e-4 if kind[1] == "fp32" else 5e-3)


@pytest.mark.distributed
def test_the_average_is_of_the_fp32_weights(runs: Callable[[int, str], Path], sets: Shards) -> None:
    for stage, precision in KINDS:
        run_dir = runs(stage, precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32  # in which DeepSpeed gets the first weights
        model = build_model(recipe_for(sets, run_dir)).to(dtype).float()
        average = {name: value.detach() for name, value in model.named_parameters()}
        for step, checkpoint in enumerate(complete_checkpoints(run_dir), start=1):
            decay = min(0.9, (1 + step) / (10 + step))
            weights = master_weights(checkpoint)
            average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
            for name, value in averaged_weights(checkpoint).items():
                torch.testing.assert_close(value, average[name], atol=1e-6, rtol=1e-5)


@pytest.mark.distributed
def test_an_export_is_a_timm_model_that_scores_as_the_run_said(
    runs: Callable[[int, str], Path], sets: Shards, tmp_path: Path
) -> None:
    export(runs(2, "fp32"), tmp_path / "model")
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert (model.num_classes, list(model.pretrained_cfg["label_names"])) == (len(CLASSES), CLASSES)
    average = averaged_weights(complete_checkpoints(runs(2, "fp32"))[-1])
    assert all(torch.equal(value, average[f"encoder.{name}"]) for name, value in model.named_parameters())
    index, logits, labels = open_index(sets.held_out), [], []
    to_device = ToDevice(torch.device("cpu"), model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    crop = model.pretrained_cfg["crop_pct"]
    with torch.inference_mode():
        for images, samples, _ in held_out_batches(index, 64, 2, Ranks(), crop):
            logits.append(model(to_device(images))[: len(samples)])
            labels += index.samples["label"][list(samples)].tolist()
    scores, true = torch.cat(logits), torch.tensor(labels, dtype=torch.int64)
    metrics = read_events(runs(2, "fp32"), "evaluation")[-1]["metrics"]
    assert metrics["val_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(scores, true)), abs=1e-5)
    assert metrics["top1"] == pytest.approx(float((scores.argmax(1) == true).float().mean()))
    assert metrics["top5"] == pytest.approx(float((scores.topk(5).indices == true[:, None]).any(1).float().mean()))


@pytest.mark.distributed
def test_runs_and_exports_are_what_others_start_from(
    runs: Callable[[int, str], Path], sets: Shards, tmp_path: Path
) -> None:
    """With their average; at another resolution with tables resized; without a head of other classes."""
    run_dir = runs(1, "bf16")
    average = model_weights(complete_checkpoints(run_dir)[-1])
    export(run_dir, tmp_path / "model")
    for source in (run_dir, tmp_path / "model"):
        model = started_from(source, sets, tmp_path)
        assert all(torch.equal(value, average[name]) for name, value in model.named_parameters())
    large = {"img_size": 96, "window_size": [6, 6, 6, 3], "pretrain_img_size": 64}
    larger = started_from(run_dir, sets, tmp_path, encoder=large, classification={})
    assert larger(torch.zeros(2, 3, 96, 96)).shape == (2, len(CLASSES))
    other = started_from(run_dir, sets, tmp_path, **{"classification.classes": [*CLASSES[1:], CLASSES[0]]})
    weights = other.state_dict()
    assert torch.equal(weights["encoder.norm.weight"], average["encoder.norm.weight"])
    assert weights["encoder.head.fc.weight"].abs().max() < 1e-3


def started_from(source: Path, sets: Shards, tmp_path: Path, **changes: Any) -> Classifier:
    recipe = recipe_for(sets, tmp_path / "another", **{"encoder.init": str(source), **changes})
    model = check(recipe, Ranks()).model
    assert isinstance(model, Classifier)
    return model


@pytest.mark.distributed
def test_other_ranks_and_stages_continue_as_if_nothing_had_changed(sets: Shards, tmp_path: Path) -> None:
    changed, whole = tmp_path / "changed", recipe_for(sets, tmp_path / "whole", **{"train.zero_stage": 2})
    for ranks, stage, until in [(2, 2, 2), (1, 3, 3), (2, 1, 4)]:
        run_ranks(train, ranks, [(recipe_for(sets, changed, **{"train.zero_stage": stage}), until)])
    run_ranks(train, 2, [(whole, 99)])
    losses = [[event["loss"] for event in read_events(run, "step")] for run in (changed, whole.run_dir)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    metrics = [read_events(run, "evaluation")[-1]["metrics"] for run in (changed, whole.run_dir)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)
    expected, found = content(whole.run_dir), content(changed)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3, msg=name)


def test_several_labels_an_image() -> None:
    recipe = recipe_for(
        Shards(Path("nowhere"), Path("nowhere")),
        Path("nowhere"),
        **{"classification": {"num_classes": 5, "multi_label": True}},
    )
    task = task_of(recipe)
    model = task.build()
    labels, mix = task.example_inputs(model, 4)
    labels[:, 2] = 1
    logits = model(images := torch.randn(4, 3, 64, 64))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, 0.9 * labels.float() + 0.05)
    torch.testing.assert_close(model(images, labels), expected)
    assert model(images, labels, mix).ndim == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "mixmae", "num_images": 3}}, "no use for the section 'method'"),
        ({"train.micro_batch": 1}, "raise it to 2"),
        ({"evaluate.shards": "nowhere"}, "shard directory nowhere does not exist"),
        (
            {"encoder.init": "nowhere"},
            "nowhere/model.safetensors does not exist; give a directory made by 'mixmae export'",
        ),
        ({"classification.num_classes": 3}, "num_classes=3, but there are 18 classes by name"),
    ],
)
def test_mistakes_are_one_clear_line(shards: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings = {"task": "finetune", "data.shards": str(shards), "run_dir": str(tmp_path / "run"), "augment.mixup": 0.8}
    recipe = tiny_recipe(**{**settings, **changes})
    with pytest.raises(UsageError, match=message) as caught:
        check(recipe, Ranks())
    assert "\n" not in str(caught.value)
