"""A picture of reconstructions: a row per mixed input, with its sources and what the model makes of them."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mixmae.models import MixMAE
from mixmae.models.methods.mixing import Mix, mix_images
from mixmae.models.methods.reconstruction import cell_deviation, cells, uncells
from mixmae.trainer.recipe.schema import Data

_GAP, _HEADER = 4, 14


@torch.no_grad()
def reconstructions(model: MixMAE, images: Tensor, mix: Mix, rows: int) -> Tensor:
    """[rows, 1 + 2K, 3, H, W], normalised: mixed input, then each source and its reconstruction.

    Cells the model saw are shown as they were; guessed ones get back the mean and deviation that the target lost. All
    ranks must come here together: under ZeRO-3 the weights are gathered from all of them.
    """
    predictions, visible = model.reconstruct(images, *mix)
    predictions, visible = predictions[:, :rows], visible[:, :rows]
    sources = images[mix.partners[: len(predictions), :rows]]
    true = torch.stack([cells(source, model.cell) for source in sources])
    if model.loss.norm_pix_loss:
        predictions = predictions * cell_deviation(true) + true.mean(-1, keepdim=True)
    painted = torch.where(visible[..., None], true, predictions)
    columns = [mix_images(images, *mix)[:rows]]
    for source, guess in zip(sources, painted, strict=True):
        columns += [source, uncells(guess, model.grid)]
    return torch.stack(columns, dim=1)


def draw(grid: Tensor, settings: Data) -> Image.Image:
    """The picture of `reconstructions`, with a header over each column."""
    std, mean = (torch.tensor(values, device=grid.device)[:, None, None] for values in (settings.std, settings.mean))
    pixels: Any = ((grid.float() * std + mean).clamp(0, 1) * 255).byte().cpu().numpy()
    rows, columns, _, height, width = pixels.shape
    canvas = Image.new("RGB", (columns * (width + _GAP) - _GAP, _HEADER + rows * (height + _GAP) - _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for column in range(columns):
        left = column * (width + _GAP)
        pen.text((left + 2, 1), _title(column), fill="black")
        for row in range(rows):
            tile = Image.fromarray(np.ascontiguousarray(pixels[row, column].transpose(1, 2, 0)))
            canvas.paste(tile, (left, _HEADER + row * (height + _GAP)))
    return canvas


def _title(column: int) -> str:
    if column == 0:
        return "mixed input"
    kind = "image" if column % 2 else "reconstructed"
    return f"{kind} {(column + 1) // 2}"
