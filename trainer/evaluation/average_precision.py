"""Average precision as COCO defines it, by faster-coco-eval: of boxes and of masks, by size, by class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from mixmae.base.errors import UsageError

Kind = Literal["bbox", "segm"]
_SIZES = ("small", "medium", "large")
_AT = {"50": 0, "75": 5}
"""Which of the thresholds 0.5, 0.55, ... is meant."""
_LAST = -1
"""Of the numbers of detections an image that are counted: 1, 10, 100."""


class Region(NamedTuple):
    """An object of an image, or what was taken for one."""

    category: int
    box: tuple[float, float, float, float]
    """x, y, width, height in the image's pixels."""
    counts: str
    """The mask, as compressed RLE."""
    area: float = 0.0
    """Pixels, as the annotation says; of detections it is the box's or the mask's own."""
    crowd: bool = False
    score: float = 0.0


class Result(NamedTuple):
    """What there is in an image, and what was found."""

    image: int
    height: int
    width: int
    objects: list[Region]
    detections: list[Region]


@dataclass(frozen=True)
class AveragePrecision:
    """Figures by COCO's names: AP, 50, 75, small, medium, large; without those of which there is no object.

    Attributes:
        per_class: of AP, by category.
    """

    figures: Mapping[str, float]
    per_class: Mapping[int, float] = field(default_factory=dict)


def require_evaluator() -> None:
    """Raises UsageError where the package for COCO's metrics is not installed."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "detectors are evaluated with faster-coco-eval; install it with: pip install 'mixmae[detection]'"
        ) from error


def average_precision(results: Sequence[Result], num_classes: int, kind: Kind) -> AveragePrecision:
    """Over thresholds 0.5, 0.55, ..., 0.95 and 100 detections an image, regions of `kind` compared.

    A detection is small or large by its box where boxes are compared, by its mask else; an object by its annotation.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    images = [{"id": one.image + 1, "height": one.height, "width": one.width} for one in results]
    common = {"images": images, "categories": [{"id": k + 1, "name": str(k)} for k in range(num_classes)], "info": {}}
    true = [_annotation(one, part, part.area) for one in results for part in one.objects]
    found = [_annotation(one, part, _area(one, part, kind)) for one in results for part in one.detections]
    ground_truth, detections = (COCO({**common, "annotations": _numbered(part)}) for part in (true, found))
    evaluation = COCOeval_faster(ground_truth, detections, kind)
    evaluation.evaluate()
    evaluation.accumulate()
    # [thresholds, recalls, classes, sizes, numbers of detections]; -1 where there are no objects.
    precision = evaluation.eval["precision"][..., _LAST]
    named = {"ap": precision[..., 0]} | {f"ap{name}": precision[at, :, :, 0] for name, at in _AT.items()}
    named |= {f"ap_{size}": precision[..., number] for number, size in enumerate(_SIZES, 1)}
    per_class = {k: _mean(precision[:, :, k, 0]) for k in range(num_classes)}
    return AveragePrecision(
        {name: mean for name, part in named.items() if (mean := _mean(part)) is not None},
        {k: mean for k, mean in per_class.items() if mean is not None},
    )


def _mean(precision: Any) -> float | None:
    there = precision[precision > -1]
    return float(np.mean(there)) if there.size else None


def _annotation(result: Result, region: Region, area: float) -> dict[str, Any]:
    return {
        "image_id": result.image + 1,
        "category_id": region.category + 1,
        "bbox": list(region.box),
        "segmentation": {"size": [result.height, result.width], "counts": region.counts},
        "area": area,
        "iscrowd": int(region.crowd),
        "score": region.score,
    }


def _numbered(annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": number, **one} for number, one in enumerate(annotations, 1)]


def _area(result: Result, region: Region, kind: Kind) -> float:
    if kind == "bbox":
        return region.box[2] * region.box[3]
    from faster_coco_eval.core import mask

    return float(mask.area({"size": [result.height, result.width], "counts": region.counts}))
