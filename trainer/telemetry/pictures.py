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


def draw_columns(columns: Sequence[Column], settings: Data) -> Image.Image:
    """The columns side by side, each under its title; images become pixels again by the recipe's mean and std."""
    device = columns[0].images.device
    std, mean = (torch.tensor(values, device=device)[:, None, None] for values in (settings.std, settings.mean))
    tiles = [_pixels(column.images, mean, std) for column in columns]
    rows, height, width, _ = tiles[0].shape
    canvas = Image.new("RGB", (len(tiles) * (width + _GAP) - _GAP, _HEADER + rows * (height + _GAP) - _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (column, tile) in enumerate(zip(columns, tiles, strict=True)):
        left = number * (width + _GAP)
        pen.text((left + 2, 1), column.title, fill="black")
        for row in range(rows):
            canvas.paste(Image.fromarray(tile[row]), (left, _HEADER + row * (height + _GAP)))
    return canvas


def _pixels(images: Tensor, mean: Tensor, std: Tensor) -> Any:
    """[rows, H, W, 3] uint8."""
    pixels = ((images.float() * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)
    return np.ascontiguousarray(pixels.cpu().numpy())
