"""Images of any size in a square."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixmae.trainer.data.encoded_image import Pixels


def paste_padded(pixels: Pixels, out: Tensor, mean: Sequence[float]) -> None:
    """Writes pixels [h, w, 3] to the upper left of `out`, uint8 [3, H, W], and the mean colour beside and below them.

    Args:
        mean: of the channels, 0 to 1: what is 0 once images are normalised, but for rounding.
    """
    height, width = pixels.shape[:2]
    colour = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)[:, None, None]
    out[:, height:] = colour
    out[:, :height, width:] = colour
    out.permute(1, 2, 0).numpy()[:height, :width] = pixels
