"""Rectangles of four channels of 16 bits, some of whose pixels hold nothing, all the way: pretraining, a probe, export,
fine-tuning, timm."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import complete_checkpoints
from mixmae.models import create_encoder
from mixmae.trainer.checkpoints.weights import model_weights
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.indexing import write_index
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation.frozen_model import open_model
from mixmae.trainer.evaluation.held_out import held_out_batches
from mixmae.trainer.evaluation.probe import main as probe
from mixmae.trainer.export.encoder_directory import load_encoder, read_config, write_encoder_directory
from mixmae.trainer.export.export import export
from mixmae.trainer.export.initial_weights import initialise_classifier, initialise_method
from mixmae.trainer.recipe.loading import parse_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.flops import model_flops
from mixmae.trainer.tasks.registry import build_model, task_of
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import ROOT, run_ranks, tar_of, tiny_recipe
from tests.trainer.checkpoints.test_elastic import train
from tests.trainer.data.test_arrays import npy, tiff

PIXELS = {"channels": 4, "dtype": "uint16", "scale": 10_000, "mean": [0.3] * 4, "std": [0.1] * 4, "nodata": 0}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scenes of 72 x 150 px in two classes, told apart by their bands; a corner of each holds nothing."""
    out = tmp_path_factory.mktemp("scenes")
    generator, files = np.random.default_rng(0), dict[str, bytes]()
    for number in range(24):
        values = generator.integers(2000, 4000, (72, 150, 4), np.uint16)
        values[..., number % 2] += 3000
        values[: 10 + number, :40] = 0
        name, content = ("npy", npy(values)) if number % 3 else ("tif", tiff(values, planarconfig="contig"))
        files |= {f"{number:03d}.{name}": content, f"{number:03d}.cls": (b"forest", b"water")[number % 2]}
    (out / "0.tar").write_bytes(tar_of(files))
    write_index(out)
    return out


def recipe_for(scenes: Path, run_dir: Path, **changes: Any) -> Recipe:
    settings = {
        "encoder.img_size": [64, 128],
        "data": {"num_workers": 0, "shards": str(scenes), **PIXELS},
        "run_dir": str(run_dir),
        "train.duration": "4 steps",
        "evaluate": {"shards": str(scenes), "every": "2 steps"},
        "checkpoint.every": "2 steps",
        "monitoring.enabled": False,
    }
    return tiny_recipe(**{**settings, **changes})


def run_all(ranks: Ranks, pretraining: Recipe, finetuning: Recipe, exported: Path) -> None:
    train(ranks, [(pretraining, 99)])
    export(pretraining.run_dir, exported)
    train(ranks, [(finetuning, 99)])


@pytest.fixture(scope="module")
def folder(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `pretrained` and `finetuned`, and `encoder`, the first one's export."""
    out = tmp_path_factory.mktemp("runs")
    evaluate = {"shards": str(scenes), "every": "2 steps", "probe": {"shards": str(scenes)}}
    pretraining = recipe_for(scenes, out / "pretrained", evaluate=evaluate, **{"log.pictures": "4 steps"})
    finetuning = recipe_for(
        scenes,
        out / "finetuned",
        task="finetune",
        augment={"random_erasing": 0.5, "mixup": 0.8},
        **{"encoder.init": str(out / "encoder")},
    )
    run_ranks(run_all, 1, pretraining, finetuning, out / "encoder")
    return out


@pytest.mark.distributed
def test_a_run_learns_and_is_judged(folder: Path) -> None:
    losses = [event["loss"] for event in read_events(folder / "pretrained", "step")]
    assert len(losses) == 4
    assert all(0.3 < loss < 2 for loss in losses)
    figures = {k: v for event in read_events(folder / "pretrained", "evaluation") for k, v in event["metrics"].items()}
    assert {"val_loss", "probe_knn", "probe_linear"} <= figures.keys()
    pictures = list((folder / "pretrained" / "pictures").iterdir())
    assert len(pictures) == 2, "after the first step and the fourth"
    assert all(Image.open(picture).size[0] > 5 * 128 for picture in pictures)
    assert all(event["loss"] < 5 for event in read_events(folder / "finetuned", "step"))


@pytest.mark.distributed
def test_timm_opens_the_export_and_probes_read_its_pixels(
    folder: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True)
    assert model.pretrained_cfg["input_size"] == (4, 64, 128)
    weights = model_weights(complete_checkpoints(folder / "pretrained")[-1])
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[f"encoder.{name}"].float()), name
    assert read_config(folder / "encoder").pixels == recipe_for(scenes, tmp_path).data.pixels
    opened, index = open_model(str(folder / "encoder"), torch.device("cpu")), open_index(scenes)
    images, samples, valid = next(
        held_out_batches(index, opened.size, 4, Ranks(), opened.crop_ratio, pixels=opened.pixels)
    )
    assert images.dtype == torch.uint16
    assert valid is not None
    assert 0.7 < valid.float().mean() < 1
    assert not valid[:, 0, 0].any()
    assert opened.to_device(images)[:, :, 0, 0].abs().max() < 1e-3, "the mean stands in the corners"
    assert opened(images)[0].shape == (4, model.num_features)
    assert list(samples) == [0, 1, 2, 3]
    probe([str(folder / "encoder"), str(scenes)])
    assert "kNN" in capsys.readouterr().out


def test_the_recipe_in_the_docs_builds() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/channels.md").read_text(), re.S)
    recipe = parse_recipe(yaml.safe_load(text), "docs/channels.md")
    with torch.device("meta"):
        model: Any = build_model(recipe)
    assert model.encoder.in_chans == 4


def test_plans_count_the_channels(scenes: Path, tmp_path: Path) -> None:
    four = recipe_for(scenes, tmp_path)
    rgb = recipe_for(scenes, tmp_path, data={"num_workers": 0})
    assert four.image_shape == (4, 64, 128)
    assert four.image_bytes == 4 * 64 * 128 * 2
    assert model_flops(four) > model_flops(rgb)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"channels": 4}},
            "mean=[0.485, 0.456, 0.406] has 3 values; expected one for each of data.channels=4",
        ),
        ({"encoder": {"in_chans": 4}}, "encoder.in_chans=4: channels belong to the images; set data.channels=4"),
        (
            {"task": "finetune", "augment.rand_augment": "rand-m9"},
            "operations are for 8-bit RGB, and the images have",
        ),
        ({"task": "segment", "segmentation.num_classes": 2}, "task=segment takes RGB images, and data.channels and"),
        ({"task": "detect", "detection.num_classes": 2}, "task=detect takes RGB images"),
    ],
)
def test_what_is_for_rgb_alone_is_refused(changes: dict[str, Any], message: str, scenes: Path, tmp_path: Path) -> None:
    pixels = {} if changes.get("data") else {"data": {"num_workers": 0, "shards": str(scenes), **PIXELS}}
    classes = {"classification.num_classes": 2} if changes.get("task") == "finetune" else {}
    with pytest.raises(UsageError) as caught:
        task_of(tiny_recipe(**{"run_dir": str(tmp_path), **pixels, **classes, **changes})).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_weights_of_rgb_images_are_adapted_as_timm_does(channels: int, tmp_path: Path) -> None:
    rgb = create_encoder("mixmae_vit_nano")
    write_encoder_directory(tmp_path / "rgb", "mixmae_vit_nano", {}, rgb.state_dict())
    expected = load_encoder(tmp_path / "rgb", in_chans=channels).state_dict()
    found = create_encoder("mixmae_vit_nano", in_chans=channels)
    initialise_classifier(found, tmp_path / "rgb", ())
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_weights_of_other_channels_are_refused(tmp_path: Path) -> None:
    four = create_encoder("mixmae_vit_nano", in_chans=4)
    write_encoder_directory(tmp_path / "four", "mixmae_vit_nano", {"in_chans": 4}, four.state_dict())
    assert read_config(tmp_path / "four").pretrained_cfg.input_size == (4, 128, 128)
    with pytest.raises(UsageError, match=r"of images of 4 channels, and data\.channels=5"):
        initialise_classifier(create_encoder("mixmae_vit_nano", in_chans=5), tmp_path / "four", ())


def test_a_decoder_of_rgb_images_begins_anew(tmp_path: Path) -> None:
    rgb, four = build_model(tiny_recipe()), build_model(recipe_for(tmp_path, tmp_path, **{"encoder.img_size": 64}))
    own = {name: value for name, value in rgb.state_dict().items() if not name.startswith("encoder.")}
    sizes = tiny_recipe().encoder.settings
    weights = {k.removeprefix("encoder."): v for k, v in rgb.state_dict().items() if k.startswith("encoder.")}
    write_encoder_directory(tmp_path / "rgb", "mixmae_swin_nano", {"img_size": 64, **sizes}, weights, ("mixmae", own))
    before = {name: value.clone() for name, value in four.state_dict().items()}
    initialise_method(four, tmp_path / "rgb", "mixmae")  # type: ignore[arg-type]
    after = four.state_dict()
    assert torch.equal(after["decoder.pred.weight"], before["decoder.pred.weight"])
    assert torch.equal(after["encoder.norm.weight"], weights["norm.weight"])
    assert not torch.equal(after["encoder.patch_embed.proj.weight"], before["encoder.patch_embed.proj.weight"])
