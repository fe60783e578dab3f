"""RoIAlign from a feature pyramid: each box from the level that fits its size."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from mixmae.models.heads.mask_rcnn.anchors import STRIDES

_USUAL_SIZE, _USUAL_LEVEL = 224, 2
"""A box of 224 px is taken from the third level (arXiv 1612.03144, equation 1)."""
_LEVELS = 4
"""The coarsest fifth level is for proposals alone."""


def level_of(boxes: Tensor) -> Tensor:
    """The level of each box [..., 4], from 0 to 3: int64 [...]."""
    area = ((boxes[..., 2:] - boxes[..., :2]).clamp(min=0)).prod(-1)
    level = torch.floor(_USUAL_LEVEL + torch.log2(area.sqrt() / _USUAL_SIZE + 1e-8))
    return level.clamp(0, _LEVELS - 1).long()


def pool_boxes(maps: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """What is inside each box, [B * R, C, size, size] in the maps' dtype, pooled in fp32.

    Aligned to pixel centres, with as many samples as a bin has positions. All boxes go to all levels, empty ones but to
    their own: an empty box is no work and gives zeros, and nothing has to wait for how many there are of each.

    Args:
        maps: [B, C, h, w] for each level, from the finest.
        boxes: fp32 [B, R, 4].
    """
    own, images = level_of(boxes)[..., None], torch.arange(len(boxes), device=boxes.device)
    images = images.view(-1, 1, 1).expand(*boxes.shape[:2], 1).to(boxes.dtype)
    pooled = None
    for level, features in enumerate(maps[:_LEVELS]):
        there = torch.cat([images, torch.where(own == level, boxes, 0.0)], dim=-1).flatten(0, 1)
        part = roi_align(features.float(), there, size, 1 / STRIDES[level], sampling_ratio=0, aligned=True)
        pooled = part if pooled is None else pooled + part
    assert pooled is not None
    return pooled.to(maps[0].dtype)
