"""Colours of classes, the same in all pictures: boxes, masks and label maps."""

from functools import cache

import torch
from torch import Tensor

from mixmae.models.heads.upernet import IGNORED


@cache
def palette() -> Tensor:
    """Colours of the classes, uint8 [256, 3], far apart; black for ignored pixels.

    Class n's bits, from the lowest on, go round red, green and blue from the highest down, as in PASCAL VOC's label
    maps; its black belongs to class 0 there, and so n + 1 is taken.
    """
    number = torch.arange(1, IGNORED + 2)
    colors = torch.zeros(IGNORED + 1, 3, dtype=torch.int64)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
    colors[IGNORED] = 0
    return colors.to(torch.uint8)


def color_of(number: int) -> tuple[int, int, int]:
    """A class's colour; those of 255 classes come round again for the next."""
    red, green, blue = palette()[number % IGNORED].tolist()
    return red, green, blue
