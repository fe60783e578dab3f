"""Classifiers on labelled shards: known logits, known metrics, class names, the same on any ranks."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2

from mixmae.base.errors import run_cli
from mixmae.models import create_encoder
from mixmae.models.layers.blocks import sincos_positions
from mixmae.trainer.data.decode import center_resized_crop
from mixmae.trainer.data.inspection import inspect_image
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.indexing import write_index
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.evaluation.evaluate import main
from mixmae.trainer.evaluation.frozen_model import FrozenModel, open_model
from mixmae.trainer.evaluation.knn import Bank, nearest, ranking
from mixmae.trainer.evaluation.multi_label_score import MultiLabelScore
from mixmae.trainer.evaluation.predict import main as predict
from mixmae.trainer.evaluation.score import Score
from mixmae.trainer.export.encoder_directory import CONFIG, write_encoder_directory
from mixmae.trainer.export.import_mixmim import main as import_release
from tests.helpers import ROOT, coloured_shards, tar_of

SIZES = {
    "img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": (4, 4, 4, 2)
}  # fmt: skip
CPU = torch.device("cpu")


def directory_of(out: Path, classes: tuple[str, ...], **facts: Any) -> Path:
    """A directory with a classifier, or an encoder alone where there are no classes."""
    torch.manual_seed(0)
    model: Any = create_encoder("mixmae_swin_nano", **SIZES)
    if classes:
        model.reset_classifier(len(classes), "avg")
    write_encoder_directory(out, "mixmae_swin_nano", SIZES, model.state_dict(), facts=facts)
    config = json.loads((out / CONFIG).read_text())
    if classes:
        config["pretrained_cfg"]["label_names"] = classes
    (out / CONFIG).write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_shards(tmp_path_factory.mktemp("coloured") / "shards", 23)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, in another order than the shards have theirs."""
    return directory_of(tmp_path_factory.mktemp("model") / "model", ("red", "green", "blue"))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that gives an image any number of classes."""
    return directory_of(
        tmp_path_factory.mktemp("several") / "model", ("cat", "dog", "sofa"), finetuning={"multi_label": True}
    )


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(ROOT / "tests" / "data" / "mixmim_finetune_tiny.safetensors")


def imported(state: dict[str, Tensor], folder: Path) -> FrozenModel:
    torch.save({"model": state}, folder / "released.pth")
    assert import_release([str(folder / "released.pth"), str(folder / "imported")]) == 0
    return open_model(str(folder / "imported"), CPU)


def released_weights(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("state."): value for name, value in reference.items() if name.startswith("state.")}


def test_an_imported_release_gives_its_logits(reference: dict[str, Tensor], tmp_path: Path) -> None:
    model = imported(released_weights(reference), tmp_path)
    assert (model.size, model.num_classes, model.crop_ratio, model.class_names) == ((224, 224), 10, 0.875, ())
    _, logits = model(reference["images_uint8"])
    assert logits is not None
    torch.testing.assert_close(logits, reference["logits"], atol=1e-4, rtol=1e-4)


def test_so_does_one_for_384_pixels(reference: dict[str, Tensor], tmp_path: Path) -> None:
    """Made of one for 224 px as the release does it: windows 16, 16, 24, 12, tables and positions resized."""
    state = released_weights(reference)
    for stage, window in enumerate((16, 16, 24, 12)):
        for name in [name for name in state if re.match(rf"layers\.{stage}\..*relative_position_bias_table", name)]:
            state[name] = resized(state[name], 2 * window - 1)
    state["absolute_pos_embed"] = resized(sincos_positions((56, 56), 16).flatten(0, 1), 96)[None]
    model = imported(state, tmp_path)
    assert (model.size, model.crop_ratio) == ((384, 384), 1.0)
    _, logits = model(reference["images_uint8"].repeat(1, 1, 2, 2)[..., :384, :384])
    assert logits is not None
    expected = load_file(ROOT / "tests" / "data" / "mixmim_finetune_tiny_384.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def resized(table: Tensor, side: int) -> Tensor:
    """A square table [l * l, C] for another side, as torch resizes images."""
    square = table.T.unflatten(1, (int(len(table) ** 0.5), -1))[None]
    return F.interpolate(square, (side, side), mode="bicubic")[0].flatten(1).T.contiguous()


def test_scores_agree_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, true = torch.randn(300, 7, generator=generator), torch.randint(6, (300,), generator=generator)
    score = Score(scores.topk(5).indices, true, 7)
    predicted = scores.argmax(1)
    for k in (1, 5):
        theirs = sklearn.metrics.top_k_accuracy_score(true, scores, k=k, labels=range(7))
        assert score.top(k) == pytest.approx(theirs)
    assert (score.confusion().numpy() == sklearn.metrics.confusion_matrix(true, predicted, labels=range(7))).all()
    recall = sklearn.metrics.recall_score(true, predicted, labels=range(6), average=None)
    assert score.per_class()[:6].tolist() == pytest.approx(recall.tolist())
    assert score.images().tolist() == torch.bincount(true, minlength=7).tolist()
    assert score.per_class()[6].isnan()


def smooth_png() -> tuple[Image.Image, bytes]:
    """300 x 400 px."""
    y, x = np.mgrid[:300, :400] / 40
    pixels = np.stack([np.sin(x) + np.cos(y), np.cos(x - y), np.sin(2 * y)], -1)
    image = Image.fromarray(((pixels / pixels.max() + 1) * 127).clip(0, 255).astype(np.uint8))
    content = io.BytesIO()
    image.save(content, "PNG")
    return image, content.getvalue()


def test_crops_are_those_of_resizing_to_256_and_cropping_224() -> None:
    image, content = smooth_png()
    ours = center_resized_crop(content, inspect_image(content), 224, 224 / 256)
    resized = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()])
    assert (ours.float() - resized(image).float()).abs().mean() < 1.5


@pytest.mark.parametrize("size", [(96, 192), (160, 96)])
def test_crops_of_a_rectangle_are_timms(size: tuple[int, int]) -> None:
    image, content = smooth_png()
    theirs = create_transform((3, *size), interpolation="bicubic", crop_pct=0.875, mean=(0, 0, 0), std=(1, 1, 1))
    ours = center_resized_crop(content, inspect_image(content), size, 0.875)
    assert (ours.float() - 255 * theirs(image)).abs().mean() < 1.5


def test_evaluate_finds_what_the_model_says(model: Path, coloured: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "found.json", tmp_path / "confusion.png"
    arguments = [str(model), str(coloured), "--knn", str(coloured), "--batch", "4"]
    assert main([*arguments, "--json", str(out), "--confusion", str(picture)]) == 0
    found = json.loads(out.read_text())
    index, opened = open_index(coloured), open_model(str(model), CPU)
    images = torch.stack(
        [center_resized_crop(index.read(i), int(index.samples[i]["state"]), 64, 0.875) for i in range(23)]
    )
    features, logits = opened(images)
    assert logits is not None
    true = np.array([{"blue": 2, "red": 0}[index.classes[label]] for label in index.samples["label"]])
    assert found["images"] == 23
    assert found["top1"] == pytest.approx(sklearn.metrics.accuracy_score(true, logits.argmax(1)))
    assert found["top5"] == 1.0
    assert {one["name"]: one["images"] for one in found["per_class"]} == {"red": 12, "blue": 11}
    neighbours = nearest(Bank(features, torch.from_numpy(true)), features, 10, Ranks())
    assert found["knn"]["10"]["top1"] == float((ranking(neighbours, 10, 3)[:, 0].numpy() == true).mean())
    assert Image.open(picture).width > 300


@pytest.mark.distributed
def test_two_ranks_find_the_same(model: Path, coloured: Path, tmp_path: Path) -> None:
    """23 images: the ranks have unequal numbers of them, and of batches' last images."""
    arguments = [str(model), str(coloured), "--knn", str(coloured), "--batch", "4", "--json"]
    assert main([*arguments, str(tmp_path / "one.json")]) == 0
    command = [sys.executable, "-m", "mixmae.launch.cli", "evaluate", *arguments, str(tmp_path / "two.json")]
    done = subprocess.run([*command, "--local", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 cpu ranks" in done.stdout
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two


def test_predict_names_classes(model: Path, coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = open_index(coloured)
    files = [str(tmp_path / f"{number}.jpg") for number in range(2)]
    for number, file in enumerate(files):
        Path(file).write_bytes(index.read(number))
    assert predict([str(model), *files, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["image"] for answer in answers] == files
    assert all(set(answer["classes"]) == {"red", "green", "blue"} for answer in answers)
    assert all(sum(answer["classes"].values()) == pytest.approx(1) for answer in answers)
    assert predict([str(model), files[0], "--top", "1"]) == 0
    (best,) = [name for name, share in answers[0]["classes"].items() if share == max(answers[0]["classes"].values())]
    assert capsys.readouterr().out.split()[-1] == best


def test_several_classes_of_an_image_have_probabilities_of_their_own(
    several: Path, coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image.jpg").write_bytes(open_index(coloured).read(0))
    assert predict([str(several), str(tmp_path / "image.jpg"), "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)["classes"]
    assert set(shares) == {"cat", "dog", "sofa"}
    assert sum(shares.values()) != pytest.approx(1, abs=1e-4)


def test_several_classes_of_an_image_are_evaluated(
    several: Path, coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = open_index(coloured), ("sofa, cat", "cat,", ",", "cat")
    files = {f"{n}.jpg": images.read(n) for n in range(23)} | {f"{n}.cls": labels[n % 4].encode() for n in range(23)}
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(tar_of(dict(sorted(files.items()))))
    index, out = write_index(tmp_path / "shards"), tmp_path / "found.json"
    assert main([str(several), str(tmp_path / "shards"), "--batch", "4", "--json", str(out)]) == 0
    assert "mAP" in capsys.readouterr().out
    found = json.loads(out.read_text())
    names = [set(index.classes[label].replace(" ", "").split(",")) for label in index.samples["label"]]
    true = np.array([[name in of_image for name in ("cat", "dog", "sofa")] for of_image in names])
    crops = [center_resized_crop(index.read(i), int(index.samples[i]["state"]), 64, 0.875) for i in range(23)]
    _, logits = open_model(str(several), CPU)(torch.stack(crops))
    assert logits is not None
    there = [0, 2]  # no image has a dog
    expected = sklearn.metrics.average_precision_score(true[:, there], logits.sigmoid()[:, there], average=None)
    assert found["mAP"] == pytest.approx(expected.mean())
    assert found["f1"] == pytest.approx(sklearn.metrics.f1_score(true, logits > 0, average="micro"))
    assert {one["name"]: one["AP"] for one in found["per_class"]} == pytest.approx(
        dict(zip(("cat", "sofa"), expected, strict=True))
    )
    assert run_cli(main, [str(several), str(coloured)]) == 2
    assert "has the class 'blue', which the model does not; its own are cat, dog, sofa" in capsys.readouterr().err
    none = tmp_path / "none"
    none.mkdir()
    (none / "0.tar").write_bytes(tar_of({"0.jpg": images.read(0), "0.cls": b","}))
    write_index(none)
    assert run_cli(main, [str(several), str(none)]) == 2
    assert "has a class; label some" in capsys.readouterr().err
    assert run_cli(main, [str(several), str(tmp_path / "shards"), "--confusion", "found.png"]) == 2
    assert "--confusion is for one class an image" in capsys.readouterr().err


def test_scores_of_several_classes_agree_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, true = torch.rand(300, 5, generator=generator), torch.rand(300, 5, generator=generator) < 0.3
    scores[:, 1] = scores[:, 1].mul(4).round() / 4  # equal scores are one threshold
    scores[:, 2] = 0.1  # never given
    true[:, 3] = False
    score, there = MultiLabelScore(scores, true), [0, 1, 2, 4]
    precisions = sklearn.metrics.average_precision_score(true[:, there], scores[:, there], average=None)
    assert score.average_precision()[there].tolist() == pytest.approx(precisions.tolist())
    assert score.average_precision()[3].isnan()
    assert score.f1() == pytest.approx(sklearn.metrics.f1_score(true, scores > 0.5, average="micro"))
    found = score.figures(str)
    assert found["mAP"] == pytest.approx(precisions.mean())
    for figure, theirs in (("precision", sklearn.metrics.precision_score), ("recall", sklearn.metrics.recall_score)):
        expected = theirs(true[:, there], scores[:, there] > 0.5, average=None, zero_division=0)
        assert [one[figure] for one in found["per_class"]] == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ((), [], "has no classifier; fine-tune it, or name labelled images for kNN"),
        (("red", "green"), [], "has 1 classes that {model} does not, the first is 'blue'"),
        (("red", "blue"), ["--json", "/nowhere/found.json"], "/nowhere is no directory"),
        (("red", "blue"), ["--results", "/found.json"], "--results /found.json is for detectors, and {model} is none"),
        (("red", "blue"), ["--batch", "0"], "--batch 0: expected 1 or more"),
        (("red", "blue"), ["--world-size", "2"], "expected world size 2, got 1"),
    ],
)
def test_mistakes_are_one_clear_line(
    coloured: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    classes: tuple[str, ...],
    options: list[str],
    message: str,
) -> None:
    model = directory_of(tmp_path / "model", classes)
    assert run_cli(main, [str(model), str(coloured), *options]) == 2
    error = capsys.readouterr().err
    assert message.format(model=model) in error
    assert error.count("\n") == 1


def test_names_that_are_no_model_and_files_that_are_no_image(
    model: Path, coloured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["resnet5000"], "resnet5000 is no directory, and timm cannot open"),
        ([str(coloured)], "is not an encoder directory"),
    ):
        assert run_cli(main, [*arguments, str(coloured)]) == 2
        assert message in capsys.readouterr().err
    assert run_cli(predict, [str(model), str(coloured / "index.json")]) == 2
    assert "cannot be used as an image" in capsys.readouterr().err
