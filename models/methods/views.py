"""Two views of an image for contrastive learning: crops, flips and colours, drawn on the CPU, applied on the device.

Images are normalised, of any number of channels, so that colours change in units of the collection's deviation.
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

_RATIO = 4 / 3
"""Width over height of a crop, at most, and at least its inverse."""
_FLIP = 0.5
_GREY = 0.2
_STRENGTH = 0.4
"""Of changes of brightness, contrast and saturation."""


def draw_views(batch: int, min_scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops fp32 [2B, 2, 3], for `affine_grid`, and colours fp32 [2B, 3], the first views before the second ones.

    Args:
        min_scale: the smallest share of the image's area that a crop shows.
    """
    u = torch.rand(10, 2 * batch, generator=generator)
    area = min_scale + (1 - min_scale) * u[0]
    ratio = ((2 * u[1] - 1) * log(_RATIO)).exp()
    width, height = ((area * by).sqrt().clamp(max=1) for by in (ratio, 1 / ratio))
    left, top = ((2 * place - 1) * (1 - side) for place, side in ((u[2], width), (u[3], height)))
    zero = torch.zeros_like(area)
    crops = torch.stack([torch.where(u[4] < _FLIP, -width, width), zero, left, zero, height, top], dim=1)
    brightness, contrast = (_STRENGTH * (2 * each - 1) for each in (u[5], u[6]))
    saturation = torch.where(u[7] < _GREY, 0, 1 + _STRENGTH * (2 * u[8] - 1))
    return crops.view(-1, 2, 3), torch.stack([brightness, 1 + contrast, saturation], dim=1)


def views_of(images: Tensor, crops: Tensor, colours: Tensor) -> Tensor:
    """The views [2B, C, H, W] of images [B, C, H, W]."""
    twice = torch.cat([images, images])
    places = F.affine_grid(crops, list(twice.shape), align_corners=False)
    views = F.grid_sample(twice, places, padding_mode="border", align_corners=False)
    brightness, contrast, saturation = colours[..., None, None, None].unbind(1)
    mean = views.mean((1, 2, 3), keepdim=True)
    views = mean + brightness + contrast * (views - mean)
    grey = views.mean(1, keepdim=True)
    return grey + saturation * (views - grey)
