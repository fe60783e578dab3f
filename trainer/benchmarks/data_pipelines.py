"""The input pipelines that `mixmae bench data` compares: ours, and torchvision's or timm's."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from mixmae.base.errors import UsageError
from mixmae.base.image_size import both_sides
from mixmae.trainer.data.augmentation.labelled import labelled_crop
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.stream import Position, Stream
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.data.transform import RandomResizedCropFlip, SampleTransform
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.data import Data


@dataclass(frozen=True)
class Variant:
    """A dataset and loader settings to measure."""

    name: str
    shards: Path
    settings: Data


def our_batches(recipe: Recipe, variant: Variant) -> Generator[int, None, None]:
    index = open_index(variant.shards)
    position, transform = Position(recipe.seed, 0, index.fingerprint), transform_of(recipe, variant, index)
    with Stream(_with(recipe, variant), Ranks(), index, position, transform=transform) as stream:
        to_device = ToDevice.of(bench_device(), recipe.data)
        for batch in stream:
            if to_device.device.type == "cuda":
                to_device(batch.images)
            yield len(batch.images)


def bench_device() -> torch.device:
    """The device that batches are copied to."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _with(recipe: Recipe, variant: Variant) -> Recipe:
    """The recipe with the variant's settings, on one rank: a global batch is a micro-batch."""
    train = recipe.train.model_copy(update={"global_batch": recipe.train.micro_batch})
    data = variant.settings.model_copy(update={"streams": None})
    return recipe.model_copy(update={"data": data, "train": train})


def augments(recipe: Recipe) -> bool:
    return recipe.augment.rand_augment is not None or recipe.augment.random_erasing > 0


def transform_of(recipe: Recipe, variant: Variant, index: ShardIndex) -> SampleTransform:
    """The recipe's; classes say nothing here."""
    if not augments(recipe):
        return RandomResizedCropFlip(recipe.encoder.img_size, variant.settings)
    return replace(
        labelled_crop(recipe, torch.zeros(len(index.classes) + 1, dtype=torch.int64)), settings=variant.settings
    )


def _reference_transform(recipe: Recipe) -> Callable[[Image.Image], torch.Tensor]:
    data, augment = recipe.data, recipe.augment
    if augments(recipe):
        made: Callable[[Image.Image], torch.Tensor] = create_transform(
            recipe.encoder.img_size,
            is_training=True,
            scale=data.crop_scale,
            hflip=data.hflip,
            color_jitter=None,
            auto_augment=augment.rand_augment,
            interpolation="bicubic",
            mean=data.mean,
            std=data.std,
            re_prob=augment.random_erasing,
            re_mode="pixel",
        )
        _spare_zero_bits(made)
        return made
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                both_sides(recipe.encoder.img_size), data.crop_scale, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(data.hflip),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )


def _spare_zero_bits(made: Any) -> None:
    """Lets timm's posterising pass over images of which it would keep no bit: recent versions of Pillow refuse that."""
    for step in made.transforms:
        for operation in getattr(step, "ops", []):
            if operation.name.startswith("Posterize"):
                posterize = operation.aug_fn
                operation.aug_fn = lambda image, bits, _posterize=posterize, **_: _posterize(image, max(1, bits))


def reference_batches(recipe: Recipe, folder: Path) -> Generator[int, None, None]:
    """torchvision's or timm's pipeline with persistent workers, for endless epochs."""
    data = recipe.data
    loader: DataLoader[Any] = DataLoader(
        datasets.ImageFolder(folder, _reference_transform(recipe)),
        batch_size=recipe.train.micro_batch,
        shuffle=True,
        drop_last=True,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor if data.num_workers else None,
        persistent_workers=data.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    if not len(loader):
        raise UsageError(f"--images is less than train.micro_batch={recipe.train.micro_batch}; increase it")
    while True:
        for images, _ in loader:
            yield len(images.to(bench_device(), non_blocking=True))
