"""Writing shards from class folders (the ImageFolder layout)."""

import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import webdataset
from tqdm import tqdm

from trainer.data.index import IMAGE_EXTENSIONS, ShardIndex, open_index, write_index
from trainer.errors import UsageError


class Sample(NamedTuple):
    key: str
    extension: str
    content: bytes
    label: int


def find_images(source: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Class names and (file, label) of a folder of class folders; of a folder of images: no classes, label -1.

    Raises:
        UsageError: no such folder, no images in it, or images beside class folders.
    """
    if not source.is_dir():
        raise UsageError(f"{source} does not exist; expected a folder of images, or of one folder for each class")
    classes = sorted(folder.name for folder in source.iterdir() if folder.is_dir())
    flat = [(file, -1) for file in sorted(source.iterdir()) if _is_image(file)]
    images = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((source / name).rglob("*"))
        if _is_image(file)
    ]
    if not images and not flat:
        raise UsageError(f"{source} holds no images ({', '.join(IMAGE_EXTENSIONS)}), alone or in class folders")
    if images and flat:
        raise UsageError(f"{source} holds images, such as {flat[0][0].name}, beside class folders; move them into one")
    return (classes, images) if images else ([], flat)


def _is_image(file: Path) -> bool:
    return file.is_file() and file.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS


def read_images(source: Path, images: list[tuple[Path, int]], seed: int) -> Iterator[Sample]:
    """The images in a seeded random order, so that every shard holds a mixture of classes; keys are unique."""
    taken: Counter[str] = Counter()
    for file, label in random.Random(seed).sample(images, len(images)):
        # A WebDataset key ends at the first dot of the file's name.
        key = str(file.relative_to(source).with_name(file.stem.replace(".", "_")))
        taken[key] += 1
        unique = key if taken[key] == 1 else f"{key}-{taken[key]}"
        yield Sample(unique, file.suffix.lower().removeprefix("."), file.read_bytes(), label)


def write_shards(
    out: Path, samples: Iterable[Sample], classes: list[str], shard_bytes: int, total: int, jobs: int = 1
) -> ShardIndex:
    """Writes shards of about `shard_bytes` and their index; the directory appears only when it is complete.

    Raises:
        UsageError: `out` exists already.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; name a directory that does not, or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # No times or owners in the tars: the same images give the same bytes.
    with webdataset.ShardWriter(
        str(partial / "%06d.tar"), maxcount=1_000_000, maxsize=shard_bytes, verbose=0, mtime=0, user="", group=""
    ) as writer:
        for sample in tqdm(samples, total=total, unit="image", desc="shards", disable=None):
            label = {"cls": sample.label} if sample.label >= 0 else {}
            writer.write({"__key__": sample.key, sample.extension: sample.content, **label})
    write_index(partial, classes, jobs)
    partial.rename(out)
    return open_index(out)
