"""What a detector finds, drawn: into an image, and beside what is there."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mixmae.models.heads.mask_rcnn.detector import Detections
from mixmae.models.heads.mask_rcnn.masks import paste_masks
from mixmae.models.methods.contract import Column
from mixmae.trainer.data.dense.masks import decode
from mixmae.trainer.evaluation.detection import Found
from mixmae.trainer.evaluation.draw import draw_objects
from mixmae.trainer.recipe.sections.data import Data
from mixmae.trainer.tasks.contract import SHOWN_SCORE, Prediction


def draw_found(image: Tensor, found: Found, names: Sequence[str]) -> Prediction:
    """An image uint8 [3, H, W] with what `find_in_image` found in it."""
    boxes, scores, classes, rles = found
    labels = [f"{names[kind]} {score:.2f}" for kind, score in zip(classes, scores, strict=True)]
    masks = (torch.from_numpy(decode(rle)).bool() for rle in rles)
    drawn = draw_objects(image, torch.tensor(boxes), masks, classes, labels)
    rows = list(zip(classes, scores, boxes, strict=True))
    return Prediction(
        Image.fromarray(drawn.permute(1, 2, 0).numpy()),
        {"objects": [{"class": names[kind], "score": score, "box": box} for kind, score, box in rows]},
        [f"{score:6.1%}  {names[kind]}  at {', '.join(f'{value:.0f}' for value in box)}" for kind, score, box in rows],
    )


def draw_columns(
    detector: Any, images: Tensor, inputs: Sequence[Tensor], rows: int, names: Sequence[str], data: Data
) -> list[Column]:
    """The first images of a micro-batch with the objects that are there, and with those that the detector finds.

    Args:
        inputs: the detector's.
    """
    images = images[:rows]
    found: Detections = detector(images)
    boxes, classes, counts, masks, _ = inputs
    scale, shift = (images.new_tensor(values)[:, None, None] for values in (data.std, data.mean))
    pixels = ((images * scale + shift).clamp(0, 1) * 255).round().byte().cpu()
    side = images.shape[2:]
    true, guessed, first = [], [], 0
    for number, image in enumerate(pixels):
        count = int(counts[number])
        own = _unpacked(masks[first : first + count]).cpu()
        true.append(draw_objects(image, boxes[number, :count].cpu(), own, classes[number, :count].tolist()))
        sure = found.of_image(number).above(SHOWN_SCORE)
        pasted = paste_masks(sure.masks, sure.boxes, side[0], side[1]).cpu()
        kinds = sure.classes.tolist()
        labels = [names[kind] for kind in kinds]
        guessed.append(draw_objects(image, sure.boxes.cpu(), pasted, kinds, labels))
        first += count
    columns = (("objects", true), (f"found, score >= {SHOWN_SCORE}", guessed))
    return [
        Column(title, (torch.stack(part).to(images.device).float() / 255 - shift) / scale) for title, part in columns
    ]


def _unpacked(masks: Tensor) -> Tensor:
    """Masks uint8 [n, H, W / 8] as bool [n, H, W]."""
    bits = torch.arange(7, -1, -1, device=masks.device, dtype=torch.uint8)
    return ((masks[..., None] >> bits) & 1).flatten(2).bool()
