"""RandAugment (arXiv 1909.13719) as timm has it, on 8-bit crops, from a generator that is a function of the sample.

Operations are Pillow's, so that pixels are those of every published recipe; drawing is ours, since timm's comes from
the process's own generators, which no resumed run has again.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Self

from PIL import Image, ImageEnhance, ImageOps

from mixmae.base.errors import UsageError

_FULL = 10.0
"""The magnitude that is level 1."""
_PARTS = re.compile(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?)")
Fill = tuple[int, int, int]


class Operation(NamedTuple):
    """One operation of RandAugment.

    Attributes:
        apply: with an amount, and the colour of what comes from outside of the image.
        amount: of a level from 0 to 1, and where magnitudes exceed 10, above.
        signed: whether the level is negative half of the time.
    """

    apply: Callable[[Image.Image, float, Fill], Image.Image]
    amount: Callable[[float], float]
    signed: bool = False


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations in a row, each drawn from all, and applied with probability `prob`.

    Attributes:
        magnitude: 10 is the full strength of an operation; drawn from a normal distribution of deviation
            `magnitude_std`, uniformly from 0 up where that is above 100.
        increasing: whether every operation is stronger at higher magnitudes, timm's `inc`.
        fill: colour of what comes from outside of the image.
    """

    fill: Fill
    magnitude: float = _FULL
    layers: int = 2
    prob: float = 0.5
    magnitude_std: float = 0.0
    magnitude_max: float = _FULL
    increasing: bool = False

    @classmethod
    def parse(cls, text: str, mean: Sequence[float]) -> Self:
        """Of timm's notation, such as rand-m9-mstd0.5-inc1.

        Args:
            mean: of pixels, from 0 to 1, of which `fill` is made.

        Raises:
            UsageError: text that is something else.
        """
        kind, *parts = text.split("-")
        found = {match[1]: float(match[2]) for part in parts if (match := _PARTS.fullmatch(part))}
        if kind != "rand" or len(found) < len(parts):
            raise UsageError(
                f"augment.rand_augment={text!r}: expected rand and parts such as m9 (magnitude), n2 (operations), "
                "p0.5, mstd0.5, mmax10 and inc1, each once, separated by '-'"
            )
        return cls(
            (_channel(mean[0]), _channel(mean[1]), _channel(mean[2])),
            found.get("m", _FULL),
            int(found.get("n", 2)),
            found.get("p", 0.5),
            found.get("mstd", 0.0),
            found.get("mmax", _FULL),
            bool(found.get("inc", 0)),
        )

    def __call__(self, image: Image.Image, random: Random) -> Image.Image:
        operations = INCREASING if self.increasing else OPERATIONS
        for operation in random.choices(list(operations.values()), k=self.layers):
            if random.random() < self.prob:
                level = self._draw_magnitude(random) / _FULL
                sign = -1 if operation.signed and random.random() < 0.5 else 1
                image = operation.apply(image, operation.amount(sign * level), self.fill)
        return image

    def _draw_magnitude(self, random: Random) -> float:
        if self.magnitude_std > 100:
            drawn = random.uniform(0, self.magnitude)
        else:
            drawn = random.gauss(self.magnitude, self.magnitude_std)
        return min(max(drawn, 0.0), self.magnitude_max)


def _channel(mean: float) -> int:
    return min(255, round(255 * mean))


def _moved(image: Image.Image, matrix: tuple[float, float, float, float, float, float], fill: Fill) -> Image.Image:
    transform, resample = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    return image.transform(image.size, transform, matrix, resample, fillcolor=fill)


def _rotated(image: Image.Image, degrees: float, fill: Fill) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)


def _added_below_middle(image: Image.Image, add: float, _: Fill) -> Image.Image:
    return image.point([min(255, value + int(add)) if value < 128 else value for value in range(256)] * 3)


def _posterized(image: Image.Image, bits: float, _: Fill) -> Image.Image:
    if bits >= 1:
        return image if bits >= 8 else ImageOps.posterize(image, int(bits))
    return image.point([0] * 768)  # which recent versions of Pillow refuse


def _around_one(level: float) -> float:
    return max(0.1, 1.0 + level * 0.9)


def _up_to_nineteen_tenths(level: float) -> float:
    return level * 1.8 + 0.1


def _solarize_below(level: float) -> float:
    return min(256, int(level * 256))


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(lambda image, _, __: ImageOps.autocontrast(image), abs),
    "Equalize": Operation(lambda image, _, __: ImageOps.equalize(image), abs),
    "Invert": Operation(lambda image, _, __: ImageOps.invert(image), abs),
    "Rotate": Operation(_rotated, lambda level: level * 30.0, signed=True),
    "Posterize": Operation(_posterized, lambda level: int(level * 4)),
    "Solarize": Operation(lambda image, below, _: ImageOps.solarize(image, int(below)), _solarize_below),
    "SolarizeAdd": Operation(_added_below_middle, lambda level: min(128, int(level * 110))),
    "Color": Operation(lambda image, by, _: ImageEnhance.Color(image).enhance(by), _up_to_nineteen_tenths),
    "Contrast": Operation(lambda image, by, _: ImageEnhance.Contrast(image).enhance(by), _up_to_nineteen_tenths),
    "Brightness": Operation(lambda image, by, _: ImageEnhance.Brightness(image).enhance(by), _up_to_nineteen_tenths),
    "Sharpness": Operation(lambda image, by, _: ImageEnhance.Sharpness(image).enhance(by), _up_to_nineteen_tenths),
    "ShearX": Operation(lambda image, by, fill: _moved(image, (1, by, 0, 0, 1, 0), fill), lambda x: x * 0.3, True),
    "ShearY": Operation(lambda image, by, fill: _moved(image, (1, 0, 0, by, 1, 0), fill), lambda x: x * 0.3, True),
    "TranslateXRel": Operation(
        lambda image, share, fill: _moved(image, (1, 0, share * image.width, 0, 1, 0), fill), lambda x: x * 0.45, True
    ),
    "TranslateYRel": Operation(
        lambda image, share, fill: _moved(image, (1, 0, 0, 0, 1, share * image.height), fill), lambda x: x * 0.45, True
    ),
}
"""By timm's names; the amounts are those of the original recipe, some of which grow weaker with the magnitude."""
INCREASING: dict[str, Operation] = {
    **OPERATIONS,
    "Posterize": OPERATIONS["Posterize"]._replace(amount=lambda level: 4 - int(level * 4)),
    "Solarize": OPERATIONS["Solarize"]._replace(amount=lambda level: 256 - _solarize_below(level)),
    **{
        name: OPERATIONS[name]._replace(amount=_around_one, signed=True)
        for name in ("Color", "Contrast", "Brightness", "Sharpness")
    },
}
"""timm's `inc1`: all grow stronger."""
