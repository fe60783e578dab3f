"""Bytes to pixels: decode, random resized crop and flip, with random numbers that belong to (seed, epoch, sample)."""

import io
import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer.config import Data

Pixels = npt.NDArray[np.uint8]
"""uint8 [3, H, W]."""
Box = tuple[float, float, float, float]
"""left, upper, right, lower, in pixels of the image."""

_ASPECT = (3 / 4, 4 / 3)


class UnreadableImageError(ValueError):
    """Bytes that are not an image."""


def open_image(content: bytes) -> Image.Image:
    """An RGB image.

    Raises:
        UnreadableImageError: the bytes are damaged, empty, not an image, or have suspiciously many pixels.
    """
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(str(error)) from error


def random_crop(width: int, height: int, scale: tuple[float, float], random: np.random.Generator) -> Box:
    """A crop of `scale` of the area and an aspect of 3/4 to 4/3 (Inception's, as torchvision's RandomResizedCrop)."""
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
            return left, upper, left + w, upper + h
    return center_crop(width, height, _ASPECT)


def center_crop(width: int, height: int, aspect: tuple[float, float] = (1.0, 1.0)) -> Box:
    """The largest crop around the middle with an aspect (width over height) within the bounds."""
    w = min(width, round(height * aspect[1]))
    h = min(height, round(width / aspect[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def training_view(content: bytes, size: int, settings: Data, random: np.random.Generator) -> Pixels:
    """A random crop, resized (bicubic) and perhaps flipped: the view that pretraining sees."""
    image = open_image(content)
    box = random_crop(*image.size, settings.crop_scale, random)
    flip = random.random() < settings.hflip
    view = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return _channels_first(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)


def evaluation_view(content: bytes, size: int) -> Pixels:
    """The largest centred square, resized: the view that a probe sees."""
    image = open_image(content)
    return _channels_first(image.resize((size, size), Image.Resampling.BICUBIC, box=center_crop(*image.size)))


def _channels_first(image: Image.Image) -> Pixels:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
