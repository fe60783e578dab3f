"""How good a detector is on held-out images: average precision of boxes and masks, of the images as they are."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from mixmae.base.image_size import ImageSize, both_sides
from mixmae.models.heads.mask_rcnn.boxes import clip_boxes
from mixmae.models.heads.mask_rcnn.detector import Detections
from mixmae.models.heads.mask_rcnn.masks import paste_masks
from mixmae.trainer.data.dense.held_out import Scene
from mixmae.trainer.data.dense.masks import encode
from mixmae.trainer.data.dense.objects import Objects
from mixmae.trainer.data.dense.resizing import fit_into
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine.distributed import Ranks, from_main, gather_to_main
from mixmae.trainer.evaluation.average_precision import Kind, Region, Result, average_precision
from mixmae.trainer.evaluation.coco_results import ResultFile

_KINDS: dict[str, Kind] = {"box": "bbox", "mask": "segm"}


def evaluate_detector(
    detector: Any,
    scenes: Iterable[Scene],
    size: ImageSize,
    batch: int,
    class_names: Sequence[str],
    to_device: ToDevice,
    ranks: Ranks,
    file: ResultFile | None = None,
) -> dict[str, float]:
    """`box_ap`, `box_ap50`, `box_ap75`, `box_ap_small`, `box_ap_medium`, `box_ap_large`, the same of `mask_`, and AP of
    each class: `box_ap/NAME`, `mask_ap/NAME`; figures of which there is no object are left out.

    Every image counts once; the main rank computes what all return.

    Args:
        detector: in eval mode, for images of `size`.
        scenes: this rank's, as many on each; images of at most that size.
        file: in which the main rank writes what is found.
    """
    own = list(detect_scenes(detector, scenes, size, batch, to_device))
    gathered = gather_to_main(own, list[Result]) if ranks.world_size > 1 else [own]
    found: dict[str, float] = {}
    if gathered is not None:
        results = sorted((result for part in gathered for result in part), key=lambda result: result.image)
        if file is not None:
            file.write(results)
        found = figures(results, class_names)
    return from_main(found, dict[str, float]) if ranks.world_size > 1 else found


def figures(results: Sequence[Result], class_names: Sequence[str]) -> dict[str, float]:
    """What `evaluate_detector` says of all images."""
    found: dict[str, float] = {}
    for name, kind in _KINDS.items():
        precision = average_precision(results, len(class_names), kind)
        found |= {f"{name}_{figure}": value for figure, value in precision.figures.items()}
        found |= {f"{name}_ap/{class_names[k]}": value for k, value in precision.per_class.items()}
    return found


def detect_scenes(
    detector: Any, scenes: Iterable[Scene], size: ImageSize, batch: int, to_device: ToDevice
) -> Iterator[Result]:
    """What there is in each scene that counts, and what the detector finds, in pixels of the original image."""
    for some in _chunks(scenes, batch):
        images, sizes = pad_images([scene.image for scene in some], size, to_device)
        found: Detections = detector(images, sizes)
        for number, scene in enumerate(some):
            if scene.counts:
                yield _result(scene, found.of_image(number))


@torch.no_grad()
def find_in_image(detector: Any, image: Tensor, size: ImageSize, to_device: ToDevice) -> Detections:
    """What a detector for images of `size` finds in one of any size, in its pixels, on the CPU; masks [n, H, W].

    Args:
        image: uint8 [3, H, W].
    """
    height, width = image.shape[1:]
    resized = fit_into(height, width, both_sides(size))
    small = resize(image, list(resized), antialias=True)
    images, sizes = pad_images([small], size, to_device)
    found: Detections = detector(images, sizes)
    one = found.of_image(0)
    boxes, masks = in_original(one, resized, (height, width))
    return Detections(boxes.cpu(), one.scores.cpu(), one.classes.cpu(), masks.cpu())


def pad_images(images: Sequence[Tensor], size: ImageSize, to_device: ToDevice) -> tuple[Tensor, Tensor]:
    """Images uint8 [3, h, w] as a batch, normalised fp32 [B, 3, H, W], 0 around them; and their sizes [B, 2]."""
    padded = torch.zeros(len(images), 3, *both_sides(size), device=to_device.device)
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = to_device(image[None])[0]
    return padded, torch.tensor([image.shape[1:] for image in images], device=to_device.device)


def in_original(found: Detections, resized: tuple[int, int], original: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes [n, 4] and masks bool [n, H, W] of one image's detections, in pixels of the original (H, W).

    Args:
        resized: height and width of the image that was looked at.
    """
    height, width = original
    factors = found.boxes.new_tensor([width / resized[1], height / resized[0]]).repeat(2)
    boxes = clip_boxes((found.boxes * factors)[None], found.boxes.new_tensor([original]))[0]
    return boxes, paste_masks(found.masks, boxes, height, width)


def _result(scene: Scene, found: Detections) -> Result:
    height, width = scene.original_size
    assert isinstance(scene.annotation, Objects)
    boxes, masks = in_original(found, (scene.image.shape[1], scene.image.shape[2]), (height, width))
    detections = [
        Region(kind, _xywh(box), encode(mask)["counts"].decode(), score=score)
        for kind, box, mask, score in zip(
            found.classes.tolist(), boxes.tolist(), masks.cpu().numpy(), found.scores.tolist(), strict=True
        )
    ]
    return Result(scene.sample, height, width, _objects(scene.annotation), detections)


def _objects(objects: Objects) -> list[Region]:
    return [
        Region(kind, _xywh(box), rle["counts"].decode(), area, crowd)
        for kind, box, rle, area, crowd in zip(
            objects.classes.tolist(),
            objects.boxes.tolist(),
            objects.segmentations,
            objects.areas.tolist(),
            objects.crowd.tolist(),
            strict=True,
        )
    ]


def _xywh(box: Sequence[float]) -> tuple[float, float, float, float]:
    left, upper, right, lower = box
    return left, upper, right - left, lower - upper


def _chunks(scenes: Iterable[Scene], size: int) -> Iterator[list[Scene]]:
    chunk: list[Scene] = []
    for scene in scenes:
        chunk.append(scene)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
