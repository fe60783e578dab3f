"""Which boxes stand for which objects, and which of them a step learns from."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

OBJECT, BACKGROUND, NEITHER = 1, 0, -1


class Matches(NamedTuple):
    """For each of N boxes of an image."""

    labels: Tensor
    """int64 [N]: OBJECT, BACKGROUND or NEITHER, which nothing is learned from."""
    objects: Tensor
    """int64 [N], the object that overlaps most; of no meaning where there is none."""


def match_boxes(
    objects: Tensor, there: Tensor, boxes: Tensor, positive: float, negative: float, keep_best: bool = False
) -> Matches:
    """Matches boxes to the objects that they overlap most.

    Args:
        objects: [G, 4], of which `there`, bool [G], says which are real.
        boxes: [N, 4].
        positive, negative: intersection over union from which on a box is an object, and below which background.
        keep_best: whether the boxes that overlap an object most, but less than that, are objects too.
    """
    iou = torch.where(there[:, None], box_iou(objects, boxes), -1.0)
    best, index = iou.max(dim=0)
    labels = torch.where(best >= positive, OBJECT, torch.where(best < negative, BACKGROUND, NEITHER))
    if keep_best:
        most = iou.amax(dim=1, keepdim=True)
        labels = torch.where(((iou == most) & (most > 0)).any(dim=0), OBJECT, labels)
    return Matches(labels, index)


@torch.no_grad()
def each_image(function: Callable[[int], Sequence[Tensor]], images: Tensor) -> list[Tensor]:
    """What a function gives for the number of each image, stacked.

    One image after the other, since overlaps of all objects with all anchors take 100 MB each; a plan, on the meta
    device, counts one.
    """
    count = len(images)
    parts = [function(0)] * count if images.is_meta else [function(number) for number in range(count)]
    return [torch.stack(of_images) for of_images in zip(*parts, strict=True)]


class Sample(NamedTuple):
    """The boxes of an image that a step learns from, objects first."""

    chosen: Tensor
    """int64 [S], which boxes."""
    labels: Tensor
    """int64 [S]: OBJECT, BACKGROUND, or NEITHER in slots for which there was no box."""


def sample_boxes(labels: Tensor, numbers: Tensor, count: int, max_objects: int, seed: Tensor) -> Sample:
    """A random choice of `count` boxes, at most `max_objects` of them objects; the same on every device.

    Args:
        labels: of `match_boxes`, [N].
        numbers: int64 [N], by which boxes are told apart: a box is as likely to be chosen, and is or is not, in
            whichever order they come.
        seed: int64 scalar, from 0 to 2**32 - 1.
    """
    order = random_order(numbers, seed)
    objects = torch.where(labels == OBJECT, order, -1.0)
    chosen = objects.topk(min(max_objects, len(labels)))
    priority = torch.where(labels == BACKGROUND, order, -1.0)
    priority = priority.scatter(
        0, chosen.indices, torch.where(chosen.values < 0, priority[chosen.indices], chosen.values + 1)
    )
    best = priority.topk(min(count, len(labels)))
    return Sample(best.indices, torch.where(best.values < 0, NEITHER, labels[best.indices]))


_MASK = 2**32 - 1


def random_order(numbers: Tensor, seed: Tensor) -> Tensor:
    """Random values fp32 [N] in [0, 1), each a function of the seed and of its number.

    A hash of 32 bits (triple32's halves, Wellons): what a generator draws depends on the device.
    """
    x = (numbers * 0x9E3779B1 + seed) & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    x = x ^ (x >> 15)
    return (x >> 8).float() / 2**24
