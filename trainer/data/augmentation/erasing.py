"""Random erasing (arXiv 1708.04896): a box of the image becomes noise."""

import math
from dataclasses import dataclass
from random import Random

import numpy as np

from mixmae.trainer.data.encoded_image import Pixels
from mixmae.trainer.recipe.sections.pixels import RGB, PixelFormat

_AREA = (0.02, 1 / 3)
_ASPECT = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class RandomErasing:
    """One box, in timm's mode `pixel`: each value normally distributed in normalised images.

    In 8 bits the noise ends where pixels do, at about two standard deviations.

    Attributes:
        prob: that an image loses a box.
        mean, std: of the channels, in units of the pixels' scale.
    """

    prob: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: PixelFormat = RGB

    def __call__(self, pixels: Pixels, random: Random) -> None:
        """Erases in place."""
        if random.random() >= self.prob:
            return
        height, width = pixels.shape[:2]
        for _ in range(10):
            area = random.uniform(*_AREA) * height * width
            aspect = math.exp(random.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                pixels[top : top + h, left : left + w] = self._noise(h, w, random)
                return

    def _noise(self, height: int, width: int, random: Random) -> Pixels:
        generator = np.random.Generator(np.random.SFC64(random.getrandbits(64)))
        noise = generator.standard_normal((height, width, self.pixels.channels), np.float32)
        noise *= np.multiply(self.std, self.pixels.scale, dtype=np.float32)
        noise += np.multiply(self.mean, self.pixels.scale, dtype=np.float32)
        if self.pixels.dtype == "float32":
            return noise
        return noise.round(out=noise).clip(0, np.iinfo(self.pixels.dtype).max, out=noise).astype(self.pixels.dtype)
