"""Boxes and masks drawn into images."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from mixmae.trainer.evaluation.class_colors import color_of

Color = tuple[int, int, int]
_ALPHA = 0.45
_LETTERS = 10
"""Pixels, at least."""
_BRIGHT = 3 * 128


def draw_objects(
    image: Tensor,
    boxes: Tensor,
    masks: Iterable[Tensor],
    classes: Sequence[int],
    labels: Sequence[str] | None = None,
) -> Tensor:
    """An image uint8 [3, H, W] with its objects; of those that overlap the first lies on top.

    Args:
        boxes: [n, 4], corners in pixels.
        masks: bool [H, W] of each, taken one at a time.
        labels: written at the boxes, if given.
    """
    if not len(boxes):
        return image.clone()
    colors = [color_of(number) for number in classes]
    drawn = _with_masks(image, masks, colors)
    colors, width = colors[::-1], max(1, min(image.shape[1:]) // 200)
    corners = torch.cat([boxes[:, :2], boxes[:, 2:].maximum(boxes[:, :2])], dim=1).flip(0)
    drawn = draw_bounding_boxes(drawn, corners, colors=colors, width=width)
    return drawn if labels is None else _with_labels(drawn, corners, list(labels)[::-1], colors)


def _with_masks(image: Tensor, masks: Iterable[Tensor], colors: Sequence[Color]) -> Tensor:
    """Masks blended into an image; torchvision's are all held at once, and black where two overlap."""
    drawn, free = image.clone(), torch.ones(image.shape[1:], dtype=torch.bool)
    levels = torch.arange(256) * (1 - _ALPHA)
    for mask, color in zip(masks, colors, strict=True):
        seen = (mask & free).numpy()
        for channel, value in zip(drawn.numpy(), color, strict=True):
            channel[seen] = (levels + value * _ALPHA).round().byte().numpy()[channel[seen]]
        free &= ~mask
    return drawn


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
