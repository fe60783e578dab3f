"""Writing shards from class folders (the ImageFolder layout)."""

import random
import shutil
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
    """Class names and (file, label) of a folder of class folders.

    Raises:
        UsageError: no such folder, or no images in class folders.
    """
    if not source.is_dir():
        raise UsageError(f"{source} does not exist; expected a folder with one folder of images for each class")
    classes = sorted(folder.name for folder in source.iterdir() if folder.is_dir())
    images = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((source / name).rglob("*"))
        if file.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
    ]
    if not images:
        raise UsageError(
            f"{source} holds no images in class folders; expected files such as {source}/cat/1.jpg "
            f"({', '.join(IMAGE_EXTENSIONS)})"
        )
    return classes, images


def read_images(source: Path, images: list[tuple[Path, int]], seed: int) -> Iterator[Sample]:
    """The images in a seeded random order, so that every shard holds a mixture of classes."""
    shuffled = random.Random(seed).sample(images, len(images))
    for file, label in shuffled:
        key = str(file.relative_to(source).with_suffix("")).replace(".", "_")
        yield Sample(key, file.suffix.lower().removeprefix("."), file.read_bytes(), label)


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
            writer.write({"__key__": sample.key, sample.extension: sample.content, "cls": sample.label})
    write_index(partial, classes, jobs)
    partial.rename(out)
    return open_index(out)
