"""Result files against pycocotools, which reads them beside the COCO file that the shards were built from."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.models.heads.mask_rcnn.box_head import DETECTIONS
from mixmae.models.heads.mask_rcnn.detector import Detections, MaskRCNN
from mixmae.models.heads.mask_rcnn.proposals import fill_slots
from mixmae.trainer.data.decode import upright_size
from mixmae.trainer.data.dense.masks import Mask
from mixmae.trainer.data.dense.objects import parse_objects
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.cli import main as shards
from mixmae.trainer.data.shards.scenes import Scenes
from mixmae.trainer.engine.distributed import Ranks, join
from mixmae.trainer.evaluation.coco_results import ResultFile
from mixmae.trainer.evaluation.evaluate import main
from mixmae.trainer.evaluation.whole_model import measure, open_for, result_file
from mixmae.trainer.export.task_directory import write_task_directory
from mixmae.trainer.recipe.sections.places import WeightedShards
from mixmae.trainer.tasks.registry import task_of
from tests.helpers import run_ranks, tiny_recipe

SIDE = 64
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""In the order of `COCOeval.stats`."""


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images`, a COCO file whose ids are neither in order nor without gaps, and shards of both."""
    folder, source = tmp_path_factory.mktemp("coco"), Scenes(9, 128, 3, "objects")
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ids = [90 - 7 * number for number in range(len(source.classes))]
    for number, entry in enumerate(source.entries):
        _, image = source.read(entry)
        (folder / "images" / f"{number}.jpg").write_bytes(image)
        objects = json.loads(source.annotation(entry, image)) if number != 4 else []
        height, width = upright_size(image)
        images.append({"id": 1000 - 13 * number, "file_name": f"{number}.jpg", "height": height, "width": width})
        for one in objects:
            one |= {"image_id": images[-1]["id"], "category_id": ids[one.pop("category")], "iscrowd": 0}
        annotations += objects
    annotations[3]["iscrowd"] = 1
    x, y, w, h = annotations[0]["bbox"]
    annotations[0]["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    categories = [{"id": number, "name": name} for number, name in zip(ids, source.classes, strict=True)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "instances.json").write_text(json.dumps(content))
    build(folder, "shards")
    return folder


def build(coco: Path, name: str) -> Path:
    options = ["--coco", str(coco / "instances.json"), "--shard-size", "20KB", "--jobs", "1"]
    assert shards(["build", str(coco / "images"), str(coco / name), *options]) == 0
    return coco / name


@pytest.fixture(scope="module")
def detector(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported one with random weights, which finds something in every image."""
    sizes = {"detection": {"channels": 16, "rois": 32}, "encoder.img_size": SIDE}
    task = task_of(tiny_recipe(task="detect", **{"data.shards": str(coco / "shards"), **sizes}))
    module = task.build()
    assert isinstance(module, MaskRCNN)
    torch.nn.init.normal_(module.box_head.score.weight, std=0.1)
    out = tmp_path_factory.mktemp("detector") / "detector"
    write_task_directory(out, task.recipe, module.state_dict())
    return out


def in_box(mask: Mask, box: Any) -> Any:
    """[28, 28]: the mask's pixels around points of the box."""
    height, width = mask.shape
    x, y = ((low + (high - low) * (np.arange(28) + 0.5) / 28).astype(int) for low, high in (box[::2], box[1::2]))
    return mask[y.clip(0, height - 1)[:, None], x.clip(0, width - 1)]


def finding(index: ShardIndex) -> Callable[..., Detections]:
    """`MaskRCNN.detections` that finds what there is in the shards' samples, in their order, more or less well."""
    generator, before = np.random.default_rng(0), 0

    def of_sample(sample: int, shown: Tensor) -> list[Tensor]:
        height, width = upright_size(index.read(sample))
        true = parse_objects(index.read_annotation(sample), height, width)
        boxes = true.boxes * (int(shown[1]) / width) + generator.normal(0, 1, true.boxes.shape)
        boxes = np.concatenate([boxes, [[0, 5, 30, 40], [10, 0, 25, 25]]])
        classes = np.concatenate([true.classes, generator.integers(0, len(index.classes), 2)])
        own = np.reshape([in_box(true.mask(number), box) for number, box in enumerate(true.boxes)], (-1, 28, 28))
        masks = np.concatenate([own, generator.random((2, 28, 28))])
        scores = generator.uniform(0.05, 1, len(boxes))
        return [fill_slots(torch.from_numpy(part), DETECTIONS) for part in (boxes, scores, classes, masks)]

    def detections(self: MaskRCNN, maps: object, shown: Tensor) -> Detections:
        nonlocal before
        samples = [min(before + number, len(index) - 1) for number in range(len(shown))]
        before += len(shown)
        parts = zip(*map(of_sample, samples, shown), strict=True)
        boxes, scores, classes, masks = (torch.stack(part) for part in parts)
        return Detections(boxes.float(), scores.float(), classes, masks.float())

    return detections


def by_pycocotools(instances: Path, results: list[dict[str, Any]], kind: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO(instances)
        evaluation = COCOeval(true, true.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(evaluation.stats[: len(FIGURES)])


def test_pycocotools_computes_the_figures_that_are_printed(
    coco: Path, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MaskRCNN, "detections", finding(open_index(coco / "shards")))
    out, figures = tmp_path / "results.json", tmp_path / "figures.json"
    assert main([str(detector), str(coco / "shards"), "--results", str(out), "--json", str(figures)]) == 0
    said = json.loads(figures.read_text())
    assert 0.1 < said["box_ap"] < 0.9
    assert 0.1 < said["mask_ap"] < 0.9
    results = json.loads(out.read_text())
    assert {one["image_id"] for one in results} == {1000 - 13 * number for number in range(9)}
    without_boxes = [{key: one[key] for key in one if key != "bbox"} for one in results]
    # Beside boxes pycocotools takes their areas for the masks' own, by which it tells small ones from large ones.
    for name, kind, found, count in (("box", "bbox", results, 6), ("mask", "segm", results, 3)):
        stats = by_pycocotools(coco / "instances.json", json.loads(json.dumps(found)), kind)[:count]
        expected = {f"{name}_{key}": value for key, value in zip(FIGURES, stats, strict=False) if value > -1}
        assert {key: said[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    stats = by_pycocotools(coco / "instances.json", without_boxes, "segm")
    expected = {f"mask_{key}": value for key, value in zip(FIGURES, stats, strict=True) if value > -1}
    assert {key: said[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def evaluate_to(ranks: Ranks, detector: Path, shards: Path, out: Path) -> None:
    task, module = open_for(detector, str(shards), 1, 1, ranks)
    file = result_file(task, out)
    join(ranks)
    measure(task, module, ranks, lambda: None, file)


@pytest.mark.distributed
def test_several_ranks_write_what_one_does(coco: Path, detector: Path, tmp_path: Path) -> None:
    files = [tmp_path / "alone.json", tmp_path / "together.json"]
    assert main([str(detector), str(coco / "shards"), "--results", str(files[0]), "--batch", "1"]) == 0
    run_ranks(evaluate_to, 2, detector, coco / "shards", files[1])
    alone, together = (json.loads(file.read_text()) for file in files)
    assert len(alone) == len(together) > 9
    for one, other in zip(alone, together, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)


def test_ids_outlive_a_new_index_and_new_shards_and_are_missing_elsewhere(
    coco: Path, detector: Path, tmp_path: Path
) -> None:
    again, copied, drawn = tmp_path / "again", tmp_path / "copied", tmp_path / "drawn"
    shutil.copytree(coco / "shards", again)
    assert shards(["index", str(again), "--jobs", "1"]) == 0
    assert shards(["build", str(again), str(copied), "--jobs", "1"]) == 0
    for folder in (again, copied):
        index = open_index(folder)
        file = ResultFile.of_shards(tmp_path / "results.json", index)
        for sample, number in enumerate(file.image_ids):
            assert index.name_of(sample).endswith(f": {(1000 - number) // 13}.jpg")
        assert list(file.category_ids) == sorted(90 - 7 * number for number in range(len(index.classes)))
    build_shards(Scenes(2, 96, 0, "objects"), drawn, 20_000, 0, 1)
    out = tmp_path / "results.json"
    with pytest.raises(UsageError, match=r"--results .*results.json: .* in a COCO file, which the shards in .*drawn"):
        ResultFile.of_shards(out, open_index(drawn))
    twice = open_index([WeightedShards(shards=str(folder)) for folder in (again, copied)])
    with pytest.raises(UsageError, match="is there twice"):
        ResultFile.of_shards(out, twice)
