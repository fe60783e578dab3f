"""Boxes and masks drawn into images."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from mixmae.trainer.evaluation.class_colors import color_of

_ALPHA = 0.45


def draw_objects(
    image: Tensor, boxes: Tensor, masks: Tensor, classes: Sequence[int], labels: Sequence[str] | None = None
) -> Tensor:
    """An image uint8 [3, H, W] with its objects; of those that overlap the first lies on top.

    Args:
        boxes: [n, 4], corners in pixels.
        masks: bool [n, H, W].
        labels: written at the boxes; none where there is no room.
    """
    if not len(boxes):
        return image.clone()
    colors = [color_of(number) for number in classes][::-1]
    drawn = draw_segmentation_masks(image, masks.flip(0), alpha=_ALPHA, colors=colors)
    width = max(1, min(image.shape[1:]) // 200)
    names = None if labels is None else list(labels)[::-1]
    corners = torch.cat([boxes[:, :2], boxes[:, 2:].maximum(boxes[:, :2])], dim=1).flip(0)
    return draw_bounding_boxes(drawn, corners, labels=names, colors=colors, width=width)
