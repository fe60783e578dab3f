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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.base.image_size import shown_size
from mixmae.trainer.benchmarks import photos
from mixmae.trainer.benchmarks.data_parts import difference_to_pillow, parts_of_work
from mixmae.trainer.benchmarks.data_pipelines import Variant, augments, bench_device, our_batches, reference_batches
from mixmae.trainer.benchmarks.profiling import synchronized_time
from mixmae.trainer.benchmarks.results import RESULTS, write_result
from mixmae.trainer.data.faults import JPEG
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.sources import open_source
from mixmae.trainer.recipe.arguments import add_recipe, at_least
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe

REFERENCE, TIMM = "imagefolder", "timm"
"""The reference of recipes that do not augment, and of those that do."""


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
        kind = "-augmented" if augments(recipe) else ""
        name = f"data-{source}{kind}-{recipe.data.num_workers}-workers.json"
        write_result(args.json if args.json.suffix == ".json" else args.json / name, result)
    return 0


def measure(recipe: Recipe, folder: Path, images: int, own: bool, seconds: float, rounds: int) -> dict[str, Any]:
    """Throughput of all variants and breakdown of their time; writes files below `folder`."""
    mean_bytes = _write_images(recipe, folder / "images", images, own)
    variants = list(_variants(recipe, folder))
    reference_name = TIMM if augments(recipe) else REFERENCE
    makers: dict[str, Callable[[], Generator[int, None, None]]] = {
        reference_name: lambda: reference_batches(recipe, folder / "images")
    }
    for variant in variants:
        makers[variant.name] = lambda variant=variant: our_batches(recipe, variant)  # type: ignore[misc]
    rates: dict[str, list[float]] = {name: [] for name in makers}
    with tqdm(total=rounds * len(makers), unit="run", desc="bench", disable=None) as bar:
        for _ in range(rounds):
            for name, make in makers.items():
                rates[name].append(_rate(make(), seconds, 2 * max(1, recipe.data.num_workers)))
                bar.update()
    reference = statistics.median(rates[reference_name])
    parts = {variant.name: parts_of_work(recipe, variant) for variant in variants}
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
        "mean_abs_difference_to_pillow": difference_to_pillow(recipe, variants[0].shards),
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


def _rate(batches: Generator[int, None, None], seconds: float, warm_up: int) -> float:
    """Images per second after warm-up batches."""
    with closing(batches):
        for _ in range(warm_up):
            next(batches)
        started, images = synchronized_time(bench_device()), 0
        while time.perf_counter() - started < seconds:
            images += next(batches)
        return images / (synchronized_time(bench_device()) - started)
