"""Boxes and masks drawn into images."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from mixmae.trainer.evaluation.class_colors import color_of

Color = tuple[int, int, int]
_ALPHA = 0.45
_LETTERS = 10
"""Pixels, at least."""
_BRIGHT = 3 * 128


def draw_objects(
    image: Tensor, boxes: Tensor, masks: Tensor, classes: Sequence[int], labels: Sequence[str] | None = None
) -> Tensor:
    """An image uint8 [3, H, W] with its objects; of those that overlap the first lies on top.

    Args:
        boxes: [n, 4], corners in pixels.
        masks: bool [n, H, W].
        labels: written at the boxes, if given.
    """
    if not len(boxes):
        return image.clone()
    colors = [color_of(number) for number in classes][::-1]
    drawn = draw_segmentation_masks(image, masks.flip(0), alpha=_ALPHA, colors=colors)
    width = max(1, min(image.shape[1:]) // 200)
    corners = torch.cat([boxes[:, :2], boxes[:, 2:].maximum(boxes[:, :2])], dim=1).flip(0)
    drawn = draw_bounding_boxes(drawn, corners, colors=colors, width=width)
    return drawn if labels is None else _with_labels(drawn, corners, list(labels)[::-1], colors)


def _with_labels(image: Tensor, corners: Tensor, labels: Sequence[str], colors: Sequence[Color]) -> Tensor:
    """A label above each box, or in it where there is no room, in letters that grow with the image."""
    canvas = Image.fromarray(image.permute(1, 2, 0).numpy())
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(max(_LETTERS, min(canvas.size) // 40))
    for (left, upper, *_), label, color in zip(corners.tolist(), labels, colors, strict=True):
        _, _, width, height = pen.textbbox((0, 0), label, font)
        x, y = max(0, min(left, canvas.width - width)), upper - height if upper >= height else upper
        pen.rectangle((x, y, x + width, y + height), color)
        pen.text((x, y), label, "black" if sum(color) > _BRIGHT else "white", font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
