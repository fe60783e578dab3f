"""Procedural scenes of several objects with their masks, for detection and segmentation.

Class = shape; everything else is nuisance, as in `synthetic`. Objects lie over each other and reach beyond the image,
images differ in size and aspect, and some are empty. Each scene is a function of (seed, number).
"""

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from mixmae.trainer.data.annotations import AnnotationKind
from mixmae.trainer.data.dense.label_maps import LabelMap, dump_label_map
from mixmae.trainer.data.dense.masks import Mask, area, box_of, encode
from mixmae.trainer.data.dense.objects import dump_objects
from mixmae.trainer.data.shards import synthetic
from mixmae.trainer.data.shards.source import Entry, Source
from mixmae.trainer.data.shards.synthetic import SHAPES, TEXTURES

BACKGROUND = "background"
_MOST = 6
_EMPTY = 0.05
_SIDES = (0.25, 0.6)
"""Of an object's square, over the image's shorter side."""
_ASPECTS = (0.7, 1.0)
_VISIBLE = 0.25
"""Share of an object that others, and the image's edges, leave at least."""


class Scene(NamedTuple):
    """An image and its objects."""

    image: Image.Image
    classes: list[int]
    masks: list[Mask]
    """Visible pixels, [height, width]; no two overlap."""
    labels: LabelMap
    """Every pixel's class: 0 for the background, then the shapes."""


class Scenes(Source):
    """`count` JPEGs whose longer side is `size` px, annotated by objects or by label maps; drawn when they are read."""

    def __init__(self, count: int, size: int, seed: int, annotations: AnnotationKind) -> None:
        self.size, self.seed, self.annotations = size, seed, annotations
        self.classes = list(SHAPES) if annotations == "objects" else [BACKGROUND, *SHAPES]
        image = round(30 * size + 0.07 * size**2)  # within some percent: shards are planned before scenes are drawn
        annotation = 700 if annotations == "objects" else 300 + 4 * size
        self.entries = [Entry(f"{number:07d}", number, image, -1, annotation) for number in range(count)]
        self._last: tuple[int, Scene] | None = None

    def read(self, entry: Entry) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        self._scene(entry.reference).image.save(buffer, "JPEG", quality=90)
        return "jpg", buffer.getvalue()

    def annotation(self, entry: Entry, image: bytes) -> bytes:
        scene = self._scene(entry.reference)
        return dump_label_map(scene.labels) if self.annotations == "segments" else objects(scene, entry.reference)

    def _scene(self, number: int) -> Scene:
        """A scene, drawn once for its image and its annotation."""
        if self._last is None or self._last[0] != number:
            self._last = number, draw(self.size, np.random.default_rng([self.seed, number]))
        return self._last[1]

    def locate(self, entry: Entry) -> str:
        return f"synthetic scene {entry.reference}"

    def describe(self) -> str:
        return f"{len(self.entries)} synthetic scenes of {self.size} px with {self.annotations}, seed {self.seed}"


def draw(size: int, random: np.random.Generator) -> Scene:
    """One scene of up to six objects."""
    short = round(size * random.uniform(*_ASPECTS))
    height, width = (size, short) if random.random() < 0.5 else (short, size)
    pixels = synthetic.tint(synthetic.clouds(size, random), *synthetic.colours(0.4, random))[:height, :width]
    owner = np.zeros((height, width), np.int64)
    whole: list[float] = []
    classes: list[int] = []
    for _ in range(0 if random.random() < _EMPTY else random.integers(1, _MOST + 1)):
        classes.append(int(random.integers(len(SHAPES))))
        whole.append(_draw_object(classes[-1], pixels, owner, len(classes), random))
    light = 1 + 0.2 * synthetic.ramp(size, random)[:height, :width, None]
    pixels = pixels * light + random.normal(0, 0.01, (height, width, 1))
    image = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
    masks = [(owner == number).astype(np.uint8) for number in range(1, len(classes) + 1)]
    seen = [i for i, mask in enumerate(masks) if mask.sum() > _VISIBLE * whole[i]]
    blurred = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.6)))
    labels = np.array([0, *(number + 1 for number in classes)], np.uint8)[owner]
    return Scene(blurred, [classes[i] for i in seen], [masks[i] for i in seen], labels)


def _draw_object(
    shape: int,
    pixels: synthetic.Floats,
    owner: npt.NDArray[np.int64],
    number: int,
    random: np.random.Generator,
) -> float:
    """Draws an object over what there is, and its number into `owner`; returns the pixels that it has as a whole."""
    height, width = owner.shape
    side = round(min(height, width) * random.uniform(*_SIDES))
    upper, left = (int(random.uniform(-0.3 * side, length - 0.7 * side)) for length in (height, width))
    pattern = synthetic.texture(str(random.choice(TEXTURES)), side, random)
    colours = synthetic.tint(pattern, *synthetic.colours(0.4, random))
    coverage = synthetic.mask(SHAPES[shape], side, random)
    rows, columns = slice(max(0, upper), upper + side), slice(max(0, left), left + side)
    part = slice(rows.start - upper, height - upper), slice(columns.start - left, width - left)
    inside = coverage[part]
    pixels[rows, columns] += inside[..., None] * (colours[part] - pixels[rows, columns])
    owner[rows, columns][inside > 0.5] = number
    return float((coverage > 0.5).sum())


def objects(scene: Scene, number: int) -> bytes:
    """The annotation of a scene's objects."""
    items = []
    for i, (category, mask) in enumerate(zip(scene.classes, scene.masks, strict=True)):
        rle = encode(mask)
        left, upper, right, lower = box_of(rle)
        items.append(
            {
                "id": number * _MOST + i + 1,
                "category": category,
                "bbox": [left, upper, right - left, lower - upper],
                "area": area(rle),
                "iscrowd": 0,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
        )
    return dump_objects(items)
