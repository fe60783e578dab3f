"""Photometric distortion (Liu et al., "SSD", 2016, section 2.2): brightness, contrast, saturation and hue, at random.

In 8 bits by tables of 256 values, rounded down after each step, as mmsegmentation does.
"""

from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image

from mixmae.trainer.data.encoded_image import Pixels

_BRIGHTNESS = 32.0
_CONTRAST = _SATURATION = (0.5, 1.5)
_HUE = 18 / 180
"""Of the circle of hues."""
_LEVELS = np.arange(256)
Levels = npt.NDArray[np.uint8]


def distort(pixels: Pixels, random: Random) -> Pixels:
    """The pixels with each of four changes at a probability of one half; contrast before or after the two of colour."""
    levels = [_linear(1.0, random.uniform(-_BRIGHTNESS, _BRIGHTNESS))] if random.random() < 0.5 else []
    contrast_first = random.random() < 0.5
    if contrast_first:
        levels += _contrast(random)
    pixels = _apply(pixels, levels)
    saturation = random.uniform(*_SATURATION) if random.random() < 0.5 else None
    hue = random.uniform(-_HUE, _HUE) if random.random() < 0.5 else None
    if saturation is not None or hue is not None:
        pixels = _change_colours(pixels, saturation, hue)
    return pixels if contrast_first else _apply(pixels, _contrast(random))


def _contrast(random: Random) -> list[Levels]:
    return [_linear(random.uniform(*_CONTRAST), 0.0)] if random.random() < 0.5 else []


def _linear(factor: float, offset: float) -> Levels:
    return (_LEVELS * factor + offset).clip(0, 255).astype(np.uint8)


def _apply(pixels: Pixels, tables: list[Levels]) -> Pixels:
    for table in tables:
        pixels = table[pixels]
    return pixels


def _change_colours(pixels: Pixels, saturation: float | None, hue: float | None) -> Pixels:
    """Changes the saturation by a factor and turns the hue by a share of the circle."""
    hues = (_LEVELS + round(256 * (hue or 0.0))) % 256
    saturations = _LEVELS if saturation is None else _linear(saturation, 0.0)
    tables = [*hues.tolist(), *saturations.tolist(), *_LEVELS.tolist()]
    return np.asarray(Image.fromarray(pixels).convert("HSV").point(tables).convert("RGB"))
