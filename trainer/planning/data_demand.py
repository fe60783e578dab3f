"""Data demand of a run: images per second, bytes per second, and the worker cores to decode them."""

import math
from dataclasses import dataclass
from pathlib import Path

from mixmae.base.image_size import ImageSize, both_sides
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.planning.speed import entries
from mixmae.trainer.recipe.schema import Recipe

IMAGENET_IMAGES = 1_281_167
IMAGENET_BYTES = 110_000
"""Mean size of a JPEG in ImageNet-1K's training set."""


@dataclass(frozen=True)
class Corpus:
    images: int
    mean_bytes: float
    source: str


@dataclass(frozen=True)
class WorkerRate:
    """Measured images per second that one core decodes and crops."""

    images_per_second: float
    img_size: ImageSize
    cpu: str
    file: str


@dataclass(frozen=True)
class Loading:
    """Data-loading demand of a node."""

    images_per_second: float
    bytes_per_second: float
    cores: int | None
    """Cores to decode that many images; None if no rate was measured."""
    workers: int | None
    """Workers per rank for those cores."""
    host_bytes: float
    """Host memory of a node for prefetched batches."""


def corpus(recipe: Recipe, images: int | None, mean_bytes: int | None) -> Corpus:
    """The given values, else the recipe's shards if their directory exists, else ImageNet-1K.

    Raises:
        UsageError: the directory exists, but its index is missing or damaged.
    """
    directories = recipe.data.directories
    if directories is not None and all(directory.is_dir() for directory in directories):
        index = open_index(recipe.data.shards)
        return Corpus(images or len(index), mean_bytes or float(index.samples["size"].mean()), recipe.data.where)
    given = [name for name, value in (("--images", images), ("--image-bytes", mean_bytes)) if value is not None]
    source = f"{' and '.join(given)}, else ImageNet-1K" if len(given) == 1 else " and ".join(given) or "ImageNet-1K"
    return Corpus(images or IMAGENET_IMAGES, mean_bytes or IMAGENET_BYTES, source)


def worker_rate(recipe: Recipe, results: Path) -> WorkerRate | None:
    """The highest measured rate of the recipe's decoder and RandAugment, at its image size if there is one.

    `mixmae bench data` measures it.
    """
    found = []
    for file in sorted(results.glob("data-*.json")):
        for entry in entries(file):
            variant = entry["variants"].get(recipe.data.decoder)
            busy = min(max(1, entry["num_workers"]), entry["cores"])
            same = entry.get("rand_augment") == recipe.augment.rand_augment
            if variant is not None and same:
                rate = variant["images_per_second"] / busy
                found.append(WorkerRate(rate, entry["img_size"], entry["cpu"], file.name))
    same_size = [rate for rate in found if both_sides(rate.img_size) == both_sides(recipe.encoder.img_size)]
    return max(same_size or found, key=lambda rate: rate.images_per_second, default=None)


def loading(
    recipe: Recipe,
    images_per_second: float,
    gpus_per_node: int,
    micro_batch: int,
    data: Corpus,
    rate: WorkerRate | None,
) -> Loading:
    """A node's data-loading demand in bytes per second, cores and host memory."""
    settings = recipe.data
    cores = None if rate is None else math.ceil(images_per_second / rate.images_per_second)
    workers = None if cores is None else math.ceil(cores / gpus_per_node)
    prefetched = max(1, workers or settings.num_workers) * settings.prefetch_factor * micro_batch * recipe.image_bytes
    return Loading(images_per_second, images_per_second * data.mean_bytes, cores, workers, prefetched * gpus_per_node)
