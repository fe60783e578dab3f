"""Proposals: the best boxes of a region proposal network, without those that lie on each other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from mixmae.models.heads.mask_rcnn.boxes import clip_boxes, decode_boxes, usable

RPN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
_NMS_IOU = 0.7


class Proposals(NamedTuple):
    """A fixed number of boxes for each image."""

    boxes: Tensor
    """fp32 [B, P, 4]; zeros in slots that were not filled."""
    there: Tensor
    """bool [B, P], which slots were."""
    anchors: Tensor
    """int64 [B, P], the number of the anchor that each came from."""


@torch.no_grad()
def select_proposals(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    sizes: Tensor,
    per_level: int,
    count: int,
) -> Proposals:
    """The boxes of highest objectness: `per_level` of each level, after suppression within levels `count` of all.

    Suppression has a number of results that depends on the data: a GPU is waited for once an image.

    Args:
        objectness, deltas: fp32 [B, n] and [B, n, 4] for each level.
        sizes: [B, 2], height and width of each image, inside which boxes are clipped.
    """
    boxes, scores, levels, numbers, first = [], [], [], [], 0
    for level, (logits, shifts, start) in enumerate(zip(objectness, deltas, anchors, strict=True)):
        best = logits.topk(min(per_level, logits.shape[1]), dim=1)
        shift = shifts.gather(1, best.indices[..., None].expand(-1, -1, 4))
        boxes.append(clip_boxes(decode_boxes(shift, start[best.indices], RPN_WEIGHTS), sizes))
        scores.append(best.values)
        levels.append(torch.full_like(best.indices[0], level))
        numbers.append(first + best.indices)
        first += len(start)
    return suppress(torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels), torch.cat(numbers, 1), count)


def suppress(boxes: Tensor, scores: Tensor, levels: Tensor, anchors: Tensor, count: int) -> Proposals:
    """Non-maximum suppression within levels; boxes [B, n, 4], scores and anchors [B, n], levels [n]."""
    slots = torch.arange(count, device=boxes.device)
    if boxes.is_meta:
        shape = (len(boxes), count)
        return Proposals(boxes.new_empty(*shape, 4), boxes.new_empty(shape, dtype=torch.bool), slots.expand(shape))
    kept = []
    for own, score in zip(boxes, scores, strict=True):
        fine = (usable(own) & score.isfinite()).nonzero()[:, 0]
        kept.append(fine[batched_nms(own[fine], score[fine], levels[fine], _NMS_IOU)[:count]])
    return Proposals(
        torch.stack([fill_slots(own[index], count) for own, index in zip(boxes, kept, strict=True)]),
        torch.stack([slots < len(index) for index in kept]),
        torch.stack([fill_slots(own[index], count) for own, index in zip(anchors, kept, strict=True)]),
    )


def fill_slots(rows: Tensor, count: int) -> Tensor:
    """[n, ...] to [count, ...], zeros behind."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
