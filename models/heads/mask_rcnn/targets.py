"""The objects of a micro-batch, in as many slots for each image as the fullest one needs."""

from typing import NamedTuple

import torch
from torch import Tensor


class Objects(NamedTuple):
    """What a step learns; the fields that a detector takes beside images, in this order, are `as_inputs`'."""

    boxes: Tensor
    """fp32 [B, G, 4], corners in pixels."""
    classes: Tensor
    """int64 [B, G], from 0."""
    there: Tensor
    """bool [B, G], which slots are filled: the first ones of each image."""
    masks: Tensor
    """uint8 [N, H, W / 8], of the filled slots one after the other, 8 pixels a byte, the first in the highest bit."""
    rows: Tensor
    """int64 [B, G], which mask is a slot's."""
    seeds: Tensor
    """int64 [B]: of each image's random choices."""

    @classmethod
    def of(cls, boxes: Tensor, classes: Tensor, counts: Tensor, masks: Tensor, seeds: Tensor) -> "Objects":
        """From a detector's inputs, on its device."""
        slots = torch.arange(boxes.shape[1], device=boxes.device)
        before = counts.cumsum(0) - counts
        there = slots < counts[:, None]
        return cls(boxes, classes, there, masks, torch.where(there, before[:, None] + slots, 0), seeds)


def pad_objects(boxes: Tensor, classes: Tensor, counts: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Objects one after the other, as a batch has them, to a detector's inputs, on the CPU.

    Args:
        boxes: fp32 [N, 4], classes int64 [N], masks uint8 [N, H, W / 8].
        counts: int64 [B], objects of each image, N in all.

    Returns:
        Boxes [B, G, 4], classes [B, G], counts [B], masks [N or 1, H, W / 8].
    """
    most = max(1, int(counts.max()))
    there = torch.arange(most) < counts[:, None]
    padded_boxes, padded_classes = boxes.new_zeros(len(counts), most, 4), classes.new_zeros(len(counts), most)
    padded_boxes[there], padded_classes[there] = boxes, classes
    return padded_boxes, padded_classes, counts, masks if len(masks) else masks.new_zeros(1, *masks.shape[1:])


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of values [B, G, ...] by number, int64 [B, R]: [B, R, ...]."""
    index = index.view(*index.shape, *[1] * (values.dim() - 2))
    return values.gather(1, index.expand(*index.shape[:2], *values.shape[2:]))
