"""A picture of what a model makes of some images: titled columns, a row for each image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mixmae.models.methods.contract import Column
from mixmae.trainer.recipe.sections.data import Data

_GAP, _HEADER = 4, 14
_DEVIATIONS = 3.0


def draw_columns(columns: Sequence[Column], settings: Data) -> Image.Image:
    """The columns side by side, each under its title; 8-bit RGB becomes pixels again by the recipe's mean and std.

    Of other images the first three channels are red, green and blue, or, of one or two, the first one is grey: from
    three standard deviations below the mean to three above.
    """
    tiles = [_pixels(_as_rgb(column.images, settings)) for column in columns]
    rows, height, width, _ = tiles[0].shape
    canvas = Image.new("RGB", (len(tiles) * (width + _GAP) - _GAP, _HEADER + rows * (height + _GAP) - _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (column, tile) in enumerate(zip(columns, tiles, strict=True)):
        left = number * (width + _GAP)
        pen.text((left + 2, 1), column.title, fill="black")
        for row in range(rows):
            canvas.paste(Image.fromarray(tile[row]), (left, _HEADER + row * (height + _GAP)))
    return canvas


def _as_rgb(images: Tensor, settings: Data) -> Tensor:
    """Normalised images [rows, C, H, W] as [rows, 3, H, W], mostly from 0 to 1."""
    if settings.pixels.is_rgb:
        std, mean = (
            torch.tensor(values, device=images.device)[:, None, None] for values in (settings.std, settings.mean)
        )
        return images.float() * std + mean
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return shown.float() / (2 * _DEVIATIONS) + 0.5


def _pixels(images: Tensor) -> Any:
    """[rows, H, W, 3] uint8."""
    pixels = (images.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)
    return np.ascontiguousarray(pixels.cpu().numpy())
