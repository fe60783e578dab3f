"""Average precision against pycocotools', on random detections of random objects."""

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mixmae.trainer.evaluation.average_precision import Kind, Region, Result, average_precision

CLASSES = 4
SIDE = 200
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""In the order of `COCOeval.stats`."""
Draw = Callable[..., list[Region]]


def region(generator: np.random.Generator, box: Any, **facts: Any) -> Region:
    """With an ellipse's mask."""
    x, y, w, h = (float(value) for value in box)
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    mask = ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1
    counts = mask_api.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    return Region(int(generator.integers(CLASSES)), (x, y, w, h), counts, area=float(mask.sum()), **facts)


def random_box(generator: np.random.Generator) -> Any:
    size = np.exp(generator.uniform(np.log(6), np.log(150), 2))
    return *(generator.uniform(0, SIDE - size)), *size


def random_results(seed: int, images: int, most_detections: int) -> list[Result]:
    """Objects found more or less well, missed, and imagined; images without any, crowds."""
    generator = np.random.default_rng(seed)
    results = []
    for image in range(images):
        count = int(generator.integers(0, 7)) * (image % 4 > 0)
        objects = [
            region(generator, random_box(generator), crowd=bool(generator.random() < 0.15)) for _ in range(count)
        ]
        detections = []
        for _ in range(int(generator.integers(0, most_detections)) * (image % 5 > 0)):
            if objects and generator.random() < 0.6:
                one = objects[generator.integers(len(objects))]
                box = np.array(one.box) + generator.normal(0, 0.08, 4) * np.array([*one.box[2:], *one.box[2:]])
                found = region(generator, np.maximum(box, [0, 0, 2, 2]), score=round(float(generator.random()), 2))
                detections.append(found._replace(category=one.category) if generator.random() < 0.9 else found)
            else:
                detections.append(region(generator, random_box(generator), score=round(float(generator.random()), 2)))
        results.append(Result(image, SIDE, SIDE, objects, detections))
    return results


def by_pycocotools(results: list[Result], kind: Kind) -> tuple[list[float], list[float]]:
    """`stats`, and AP of each class, -1 where there are no objects."""
    size = [SIDE, SIDE]
    annotations = [
        {
            "id": 0,
            "image_id": result.image,
            "category_id": one.category,
            "bbox": list(one.box),
            "area": one.area,
            "iscrowd": int(one.crowd),
            "segmentation": {"size": size, "counts": one.counts},
        }
        for result in results
        for one in result.objects
    ]
    dataset = {
        "images": [{"id": result.image, "height": SIDE, "width": SIDE} for result in results],
        "categories": [{"id": number} for number in range(CLASSES)],
        "annotations": [{**one, "id": number} for number, one in enumerate(annotations, 1)],
    }
    found = [
        {"image_id": result.image, "category_id": one.category, "score": one.score}
        | ({"bbox": list(one.box)} if kind == "bbox" else {"segmentation": {"size": size, "counts": one.counts}})
        for result in results
        for one in result.detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = dataset
        ground_truth.createIndex()
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(copy.deepcopy(found)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_class = [part[part > -1].mean() if (part > -1).any() else -1 for part in np.moveaxis(precision, 2, 0)]
    return list(evaluation.stats), per_class


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize(("seed", "images", "most"), [(0, 20, 20), (1, 3, 260), (2, 8, 5)])
def test_it_is_pycocotools(seed: int, images: int, most: int, kind: Kind) -> None:
    results = random_results(seed, images, most)
    assert most < 200 or max(len(result.detections) for result in results) > 100
    stats, per_class = by_pycocotools(results, kind)
    found = average_precision(results, CLASSES, kind)
    expected = {name: value for name, value in zip(NAMES, stats[: len(NAMES)], strict=True) if value > -1}
    assert found.figures == pytest.approx(expected, abs=1e-6)
    assert 0.01 < found.figures["ap"] < 0.9
    assert found.per_class == pytest.approx({k: v for k, v in enumerate(per_class) if v > -1}, abs=1e-6)


def test_nothing_found_is_an_ap_of_0_and_no_objects_no_ap() -> None:
    generator = np.random.default_rng(0)
    one = region(generator, (50, 50, 60, 60))
    missed = average_precision([Result(7, SIDE, SIDE, [one], [])], CLASSES, "bbox")
    assert missed.figures == {"ap": 0, "ap50": 0, "ap75": 0, "ap_medium": 0}
    assert missed.per_class == {one.category: 0}
    empty = average_precision([Result(7, SIDE, SIDE, [], [one._replace(score=0.9)])], CLASSES, "segm")
    assert empty.figures == {}
    assert empty.per_class == {}


def test_what_is_found_exactly_is_an_ap_of_1() -> None:
    generator = np.random.default_rng(1)
    objects = [region(generator, box) for box in ((5, 5, 20, 20), (50, 50, 60, 60), (90, 20, 100, 120))]
    results = [Result(0, SIDE, SIDE, objects, [one._replace(score=0.8) for one in objects])]
    assert set(average_precision(results, CLASSES, "segm").figures.values()) == {1.0}
