"""Photographs for benchmarks: variations of those that scikit-image, scikit-learn and matplotlib ship.

About as large as ImageNet's: 500 x 375 px, 100 KB. Each is a function of its index.
"""

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from mixmae.base.errors import UsageError

_LONG_SIDE = 500


@cache
def originals() -> tuple[Image.Image, ...]:
    """The shipped photographs.

    Raises:
        UsageError: a package that ships some is not installed.
    """
    try:
        import matplotlib.cbook
        import skimage.data
        import sklearn.datasets
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--photos needs {error.name}, which is not installed; run pip install 'mixmae[bench]'"
        ) from error
    arrays = [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]
    arrays += list(sklearn.datasets.load_sample_images().images)
    arrays.append(np.asarray(Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))))
    return tuple(Image.fromarray(array).convert("RGB") for array in arrays)


def photo(number: int) -> Image.Image:
    """A variation: a random crop, flip, brightness, contrast and colour."""
    random = np.random.default_rng([7, number])
    image = originals()[number % len(originals())]
    share = float(np.sqrt(random.uniform(0.6, 1.0)))
    width, height = round(image.width * share), round(image.height * share)
    left, upper = (int(random.integers(0, end + 1)) for end in (image.width - width, image.height - height))
    image = image.crop((left, upper, left + width, upper + height))
    scale = _LONG_SIDE / max(image.size)
    image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(random.uniform(0.8, 1.25))
    return image


def jpeg_photo(number: int) -> bytes:
    """A variation as JPEG, quality 95 to 98, 4:2:0 chroma subsampling as from cameras."""
    buffer = io.BytesIO()
    photo(number).save(buffer, "JPEG", quality=95 + number % 4, subsampling="4:2:0")
    return buffer.getvalue()


def write_photos(folder: Path, count: int) -> Iterator[Path]:
    """Writes `count` photographs, in a class folder for each original."""
    for number in range(count):
        file = folder / f"{number % len(originals()):02d}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg_photo(number))
        yield file
