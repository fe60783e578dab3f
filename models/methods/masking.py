"""Masking of single images: what SimMIM, MAE and the ablations of MixMAE share.

Shapes: Gh, Gw the mask's grid; a mask is bool [B or 1, Gh, Gw], True where the image is hidden.
"""

import torch
from torch import Tensor

from mixmae.models.methods.mixing import upsample_groups


def draw_order(rows: int, cells: int, generator: torch.Generator) -> Tensor:
    """Random orders of cells, int64 [rows, cells]."""
    return torch.rand(rows, cells, generator=generator).argsort(dim=1)


def first_of(order: Tensor, count: int) -> Tensor:
    """bool, True at the cells that come among the first `count` of `order` [B or 1, L]."""
    return order.argsort(dim=1) < count


def check_ratio(mask_ratio: float, masked: int, cells: int) -> None:
    """Raises ValueError unless some cells are masked, and some are not."""
    if not 0 < masked < cells:
        raise ValueError(
            f"mask_ratio is {mask_ratio}, which masks {masked} of {cells} cells; expected a share between 0 and 1 that "
            "masks some and leaves some"
        )


def replace_tokens(x: Tensor, mask: Tensor, token: Tensor | None) -> Tensor:
    """The map [B, H, W, C] with a token [1, 1, C], or zeros, where a mask hides the image."""
    hidden = upsample_groups(mask, (x.shape[1], x.shape[2]))[..., None]
    return torch.where(hidden, 0 if token is None else token.to(x.dtype), x)


def blank(images: Tensor, mask: Tensor) -> Tensor:
    """Images with zeros, the mean colour of normalised ones, where a mask hides them."""
    hidden = upsample_groups(mask, (images.shape[2], images.shape[3]))[:, None]
    return torch.where(hidden, 0, images)
