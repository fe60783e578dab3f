"""A procedural, labelled corpus, so that a first run needs no download.

Class = shape x texture. Everything else is nuisance: colours, place, size, direction, light, blur, sensor noise, and a
clouded background. Each image is a function of (seed, number).
"""

import io
import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from mixmae.trainer.data.shards.source import Entry, Source

SHAPES = ("disc", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("stripes", "checks", "dots")
CLASSES = [f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES]

Floats = npt.NDArray[np.float64]


class Synthetic(Source):
    """`count` JPEGs of `size` px, the classes in turn; drawn when they are read."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.classes = CLASSES
        expected = round(30 * size + 0.08 * size**2)  # within some percent: shards are planned before images are drawn
        self.entries = [Entry(f"{number:07d}", number, expected, number % len(CLASSES)) for number in range(count)]

    def read(self, entry: Entry) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        random = np.random.default_rng([self.seed, entry.reference])
        draw(entry.label, self.size, random).save(buffer, "JPEG", quality=90)
        return "jpg", buffer.getvalue()

    def locate(self, entry: Entry) -> str:
        return f"synthetic image {entry.reference}"

    def describe(self) -> str:
        return f"{len(self.entries)} synthetic images of {self.size} px, seed {self.seed}"


def draw(label: int, size: int, random: np.random.Generator) -> Image.Image:
    """One image of a class."""
    shape, texture_name = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    background = tint(clouds(size, random), *colours(0.5, random))
    pattern = tint(texture(texture_name, size, random), *colours(0.6, random))
    coverage = mask(shape, size, random)[..., None]
    light = 1 + 0.25 * ramp(size, random)[..., None]
    pixels = (background * (1 - coverage) + pattern * coverage) * light + random.normal(0, 0.01, (size, size, 1))
    image = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.8)))


def colours(contrast: float, random: np.random.Generator) -> tuple[Floats, Floats]:
    """Two colours that differ in luminance by `contrast` and a little in hue: in photographs channels go together."""
    luminance = random.uniform(0.15, 0.85)
    other = luminance + (contrast if luminance < 0.5 else -contrast)
    first, second = (level + random.uniform(-0.06, 0.06, 3) for level in (luminance, other))
    return first.clip(0, 1), second.clip(0, 1)


def tint(values: Floats, low: Floats, high: Floats) -> Floats:
    return low + values[..., None] * (high - low)


def clouds(size: int, random: np.random.Generator) -> Floats:
    """Noise with amplitude 1/f^2, scaled to 0..1."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij"))
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(random.normal(size=(size, size))) / frequency**2
    noise = np.fft.irfft2(spectrum, (size, size))
    low, high = np.percentile(noise, (2, 98))
    return ((noise - low) / (high - low)).clip(0, 1)


def texture(name: str, size: int, random: np.random.Generator) -> Floats:
    """A pattern in one of four directions, with five periods to the image."""
    angle = random.integers(4) * math.pi / 4 + random.uniform(-0.06, 0.06)
    y, x = (np.mgrid[:size, :size] - size / 2) * (2 * math.pi * 5 / size)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    wave = {
        "stripes": np.sin(u),
        "checks": np.sin(u / 1.4) * np.sin(v / 1.4) * 2,
        "dots": np.cos(u) + np.cos(v) - 0.7,
    }[name]
    return 1 / (1 + np.exp(-6 * wave))


def ramp(size: int, random: np.random.Generator) -> Floats:
    """Light from one side, -1..1."""
    angle = random.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    return (x * math.cos(angle) + y * math.sin(angle)) / math.sqrt(2)


def mask(shape: str, size: int, random: np.random.Generator) -> Floats:
    """The shape's coverage 0..1, drawn at four times the size for smooth edges."""
    scale = 4
    radius = random.uniform(0.38, 0.5) * size
    centre = random.uniform(0.44, 0.56, 2) * size
    canvas = Image.new("L", (size * scale, size * scale))
    pen = ImageDraw.Draw(canvas)
    turn = random.uniform(-0.15, 0.15) - math.pi / 2

    def ring_of(count: int, *radii: float) -> list[tuple[float, float]]:
        angles = [turn + 2 * math.pi * i / count for i in range(count)]
        return [
            (
                scale * (centre[0] + radii[i % len(radii)] * radius * math.cos(a)),
                scale * (centre[1] + radii[i % len(radii)] * radius * math.sin(a)),
            )
            for i, a in enumerate(angles)
        ]

    if shape == "disc":
        pen.polygon(ring_of(90, 0.9), fill=255)
    elif shape == "ring":
        pen.polygon(ring_of(90, 1.0), fill=255)
        pen.polygon(ring_of(90, 0.55), fill=0)
    elif shape == "square":
        pen.polygon(ring_of(4, 1.1), fill=255)
    elif shape == "triangle":
        pen.polygon(ring_of(3, 1.2), fill=255)
    elif shape == "star":
        pen.polygon(ring_of(10, 1.2, 0.5), fill=255)
    else:
        arms = ring_of(4, 1.1)
        pen.line([arms[0], arms[2]], fill=255, width=int(0.6 * radius * scale))
        pen.line([arms[1], arms[3]], fill=255, width=int(0.6 * radius * scale))
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255
