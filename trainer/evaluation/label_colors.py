"""Label maps as colours over their images."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mixmae.models.heads.upernet import IGNORED
from mixmae.trainer.evaluation.class_colors import palette

_OPACITY = 0.6


def paint(images: Tensor, labels: Tensor) -> Tensor:
    """Images with the colours of their label maps over them; ignored pixels stay as they are.

    Args:
        images: [..., 3, H, W], from 0 to 1.
        labels: uint8 [..., H, W].
    """
    colors = palette().to(images.device, images.dtype)[labels.long()].movedim(-1, -3) / 255
    opacity = (labels != IGNORED).to(images.dtype).unsqueeze(-3) * _OPACITY
    return torch.lerp(images, colors, opacity.expand_as(images))


def picture(image: Tensor, labels: Tensor) -> Image.Image:
    """`paint`, of one image uint8 [3, H, W]."""
    painted = (paint(image / 255, labels) * 255).round().to(torch.uint8)
    return Image.fromarray(painted.permute(1, 2, 0).contiguous().numpy())


def paint_normalised(images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`paint`, of images that were normalised, which the result is again."""
    shift, scale = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (paint(images * scale + shift, labels) - shift) / scale
