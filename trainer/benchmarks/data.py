"""`mixmae bench data RECIPE`: images per second of the input pipeline, compared with torchvision's in the same process.

All variants load the same JPEGs with the recipe's crops, image size, micro-batch and workers. The reference is
torchvision's ImageFolder with PIL, RandomResizedCrop, flip, ToTensor and Normalize; for a recipe with `augment:` it is
timm's create_transform of the same settings. Variants are interleaved, and the median over rounds is reported. If there
is a GPU, batches are copied to it.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.base.image_size import both_sides, shown_size
from mixmae.trainer.benchmarks import photos
from mixmae.trainer.benchmarks.profiling import synchronized_time
from mixmae.trainer.benchmarks.results import RESULTS, write_result
from mixmae.trainer.data.augmentation.labelled import LabelledCrop, labelled_crop
from mixmae.trainer.data.batch_reader import BatchReader
from mixmae.trainer.data.decode import decode_crop, open_encoded, plan_random_crop, random_resized_crop, resize_crop
from mixmae.trainer.data.faults import JPEG
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.order import BatchSlice, SampleRef
from mixmae.trainer.data.rng import Purpose, random_at
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.sources import open_source
from mixmae.trainer.data.stream import Position, Stream
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.data.transform import RandomResizedCropFlip, SampleTransform
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.arguments import add_recipe, at_least
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.data import Data

REFERENCE, TIMM = "imagefolder", "timm"
"""The reference of recipes that do not augment, and of those that do."""


@dataclass(frozen=True)
class Variant:
    """A dataset and loader settings to measure."""

    name: str
    shards: Path
    settings: Data


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench data", description=__doc__)
    add_recipe(parser)
    parser.add_argument(
        "--images", type=at_least(1), default=600, help="number of images of the recipe's shards to load repeatedly"
    )
    parser.add_argument("--photos", action="store_true", help="photographs shipped by packages instead of shards")
    parser.add_argument("--seconds", type=float, default=5.0, help="per variant and round (default %(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"write the figures to a file, or to {RESULTS}/data-*.json"
    )
    args = parser.parse_intermixed_args(argv)
    recipe = load_recipe(args.recipe, args.overrides)
    with tempfile.TemporaryDirectory(prefix="mixmae-bench-") as folder:
        result = measure(recipe, Path(folder), args.images, args.photos, args.seconds, args.rounds)
    print(table(result))
    if args.json is not None:
        source = "photos" if args.photos else args.recipe.stem
        kind = "-augmented" if _augments(recipe) else ""
        name = f"data-{source}{kind}-{recipe.data.num_workers}-workers.json"
        write_result(args.json if args.json.suffix == ".json" else args.json / name, result)
    return 0


def measure(recipe: Recipe, folder: Path, images: int, own: bool, seconds: float, rounds: int) -> dict[str, Any]:
    """Throughput of all variants and breakdown of their time; writes files below `folder`."""
    mean_bytes = _write_images(recipe, folder / "images", images, own)
    variants = list(_variants(recipe, folder))
    reference_name = TIMM if _augments(recipe) else REFERENCE
    makers: dict[str, Callable[[], Generator[int, None, None]]] = {
        reference_name: lambda: _reference(recipe, folder / "images")
    }
    for variant in variants:
        makers[variant.name] = lambda variant=variant: _ours(recipe, variant)  # type: ignore[misc]
    rates: dict[str, list[float]] = {name: [] for name in makers}
    with tqdm(total=rounds * len(makers), unit="run", desc="bench", disable=None) as bar:
        for _ in range(rounds):
            for name, make in makers.items():
                rates[name].append(_rate(make(), seconds, 2 * max(1, recipe.data.num_workers)))
                bar.update()
    reference = statistics.median(rates[reference_name])
    parts = {variant.name: _parts(recipe, variant) for variant in variants}
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "img_size": recipe.encoder.img_size,
        "crop_scale": recipe.data.crop_scale,
        "rand_augment": recipe.augment.rand_augment,
        "random_erasing": recipe.augment.random_erasing,
        "micro_batch": recipe.train.micro_batch,
        "num_workers": recipe.data.num_workers,
        "images": images,
        "mean_bytes": mean_bytes,
        "mean_abs_difference_to_pillow": _difference(recipe, variants[0].shards),
        "variants": {
            name: {
                "images_per_second": round(statistics.median(values), 1),
                "ratio_to_reference": round(statistics.median(values) / reference, 3),
                "rounds": [round(value, 1) for value in values],
                **({"microseconds_per_image": parts[name]} if name in parts else {}),
            }
            for name, values in rates.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['images']} images of {result['mean_bytes'] / 1000:.0f} KB, {shown_size(result['img_size'])} px, "
        f"{result['num_workers']} workers; fast differs from pillow by "
        f"{result['mean_abs_difference_to_pillow']:.2f} of 255",
        f"{'':<16}{'images/s':>9}{'ratio':>7}   microseconds of one core per image",
    ]
    for name, row in result["variants"].items():
        parts = row.get("microseconds_per_image", {})
        shown = "  ".join(f"{part} {value:.0f}" for part, value in parts.items())
        lines.append(f"{name:<16}{row['images_per_second']:>9.0f}{row['ratio_to_reference']:>7.2f}   {shown}")
    return "\n".join(lines)


def _write_images(recipe: Recipe, folder: Path, count: int, own: bool) -> float:
    """Writes the files that all variants load; returns their mean size in bytes."""
    if own:
        files = list(photos.write_photos(folder, count))
    else:
        index = open_index(recipe.data.shards, recipe.data.network, recipe.data.cache)
        files = list(_copy_jpegs(index, folder, count, recipe.seed))
        index.store.close()
    return statistics.mean(file.stat().st_size for file in files)


def _copy_jpegs(index: ShardIndex, folder: Path, count: int, seed: int) -> Iterator[Path]:
    jpegs = np.flatnonzero(index.samples["state"] == JPEG)
    if not len(jpegs):
        raise UsageError(f"{index.store.location} contains no JPEGs; use --photos")
    chosen = np.random.default_rng(seed).permutation(jpegs)[:count]
    for number, sample in enumerate(np.sort(chosen)):
        file = folder / "images" / f"{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(index.read(int(sample)))
        yield file


def _variants(recipe: Recipe, folder: Path) -> Iterator[Variant]:
    source = open_source(str(folder / "images"))
    plain = folder / "shards"
    build_shards(source, plain, 2**24, seed=0, jobs=2)
    for decoder in ("pillow", "fast"):
        yield Variant(decoder, plain, recipe.data.model_copy(update={"decoder": decoder}))
    if shutil.which("jpegtran") is not None:
        seekable = folder / "seekable"
        build_shards(source, seekable, 2**24, seed=0, jobs=2, seekable=True)
        yield Variant("fast, seekable", seekable, recipe.data.model_copy(update={"decoder": "fast"}))


def _ours(recipe: Recipe, variant: Variant) -> Generator[int, None, None]:
    index = open_index(variant.shards)
    position, transform = Position(recipe.seed, 0, index.fingerprint), _transform(recipe, variant, index)
    with Stream(_with(recipe, variant), Ranks(), index, position, transform=transform) as stream:
        to_device = ToDevice.of(_device(), recipe.data)
        for batch in stream:
            if to_device.device.type == "cuda":
                to_device(batch.images)
            yield len(batch.images)


def _device() -> torch.device:
    """The device that batches are copied to."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _with(recipe: Recipe, variant: Variant) -> Recipe:
    """The recipe with the variant's settings, on one rank: a global batch is a micro-batch."""
    train = recipe.train.model_copy(update={"global_batch": recipe.train.micro_batch})
    data = variant.settings.model_copy(update={"streams": None})
    return recipe.model_copy(update={"data": data, "train": train})


def _augments(recipe: Recipe) -> bool:
    return recipe.augment.rand_augment is not None or recipe.augment.random_erasing > 0


def _transform(recipe: Recipe, variant: Variant, index: ShardIndex) -> SampleTransform:
    """The recipe's; classes say nothing here."""
    if not _augments(recipe):
        return RandomResizedCropFlip(recipe.encoder.img_size, variant.settings)
    return replace(
        labelled_crop(recipe, torch.zeros(len(index.classes) + 1, dtype=torch.int64)), settings=variant.settings
    )


def _reference_transform(recipe: Recipe) -> Callable[[Image.Image], torch.Tensor]:
    data, augment = recipe.data, recipe.augment
    if _augments(recipe):
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


def _reference(recipe: Recipe, folder: Path) -> Generator[int, None, None]:
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
            yield len(images.to(_device(), non_blocking=True))


def _rate(batches: Generator[int, None, None], seconds: float, warm_up: int) -> float:
    """Images per second after warm-up batches."""
    with closing(batches):
        for _ in range(warm_up):
            next(batches)
        started, images = synchronized_time(_device()), 0
        while time.perf_counter() - started < seconds:
            images += next(batches)
        return images / (synchronized_time(_device()) - started)


def _parts(recipe: Recipe, variant: Variant, count: int = 300) -> dict[str, float]:
    """Microseconds per image on one core, by part of a worker's work."""
    index, size = open_index(variant.shards), recipe.encoder.img_size
    settings, spent = variant.settings, dict.fromkeys(("read", "decode", "resize", "augment", "collate"), 0.0)
    samples = [number % len(index) for number in range(count)]
    transform = _transform(recipe, variant, index)
    reader = BatchReader(index, transform, recipe.seed)
    request = BatchSlice([SampleRef(0, sample, 0) for sample in samples], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reader.__getitems__(request)
    for sample in samples:
        times = [time.perf_counter()]
        content = index.read(sample)
        times.append(time.perf_counter())
        source = open_encoded(content, int(index.samples[sample]["state"]), settings.decoder)
        random = random_at(Purpose.AUGMENTATION, recipe.seed, 0, sample)
        plan = plan_random_crop(source, size, settings, random)
        pixels = decode_crop(source, plan)
        times.append(time.perf_counter())
        resized = resize_crop(pixels, plan, size, settings.decoder)
        times.append(time.perf_counter())
        if isinstance(transform, LabelledCrop):
            transform.augment(resized.permute(1, 2, 0).numpy(), random)
        times.append(time.perf_counter())
        for part, (start, end) in zip(spent, pairwise(times), strict=False):
            spent[part] += end - start
    started = time.perf_counter()
    reader.__getitems__(request)
    whole = time.perf_counter() - started
    spent["collate"] = max(0.0, whole - sum(spent.values()))
    torch.set_num_threads(threads)
    index.store.close()
    return {part: round(value / count * 1e6, 1) for part, value in spent.items()}


def _difference(recipe: Recipe, shards: Path, count: int = 100) -> float:
    """Mean absolute difference between the crops of both decoders, on a scale of 255."""
    index = open_index(shards)
    differences = []
    for sample in range(min(count, len(index))):
        content, state = index.read(sample), int(index.samples[sample]["state"])
        fast, plain = (
            random_resized_crop(
                content,
                state,
                recipe.encoder.img_size,
                recipe.data.model_copy(update={"decoder": decoder}),
                random_at(Purpose.AUGMENTATION, recipe.seed, 0, sample),
            )
            for decoder in ("fast", "pillow")
        )
        differences.append(float((fast.int() - plain.int()).abs().float().mean()))
    index.store.close()
    return statistics.mean(differences)
