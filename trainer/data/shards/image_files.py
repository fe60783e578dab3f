"""Image files as a source of shards: of a folder, or of a list."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.trainer.data.extensions import ALL_IMAGE_EXTENSIONS
from mixmae.trainer.data.faults import first_names
from mixmae.trainer.data.index import UNLABELLED
from mixmae.trainer.data.shards.heic import require_heic_reader
from mixmae.trainer.data.shards.image_folders import extension_of, find_images, require_no_splits
from mixmae.trainer.data.shards.lists import read_list
from mixmae.trainer.data.shards.source import Entry, Source, key_of, unique


@dataclass(frozen=True)
class Files(Source):
    """Image files; references are paths relative to `root`."""

    root: Path
    entries: list[Entry]
    classes: list[str]
    left_out: Sequence[tuple[str, str]] = ()

    def read(self, entry: Entry) -> tuple[str, bytes]:
        file = self.root / entry.reference
        return extension_of(file), file.read_bytes()

    def locate(self, entry: Entry) -> str:
        return str(self.root / entry.reference)

    def describe(self) -> str:
        return f"files of {self.root}"


def open_folder(root: Path) -> Files:
    """Images in a folder, or in one folder for each class. Says on standard error what it does not use.

    Raises:
        UsageError: as `find_images`.
    """
    entries, classes, left_out = list_folder(root)
    beside = [entry.reference for entry in entries if entry.label == UNLABELLED]
    if classes and beside:
        print(f"unlabelled: {len(beside)} images beside class folders: {first_names(beside)}", file=sys.stderr)
    return Files(root, entries, classes, left_out)


class ListedFolder(NamedTuple):
    entries: list[Entry]
    """Labelled by the folders that they lie in."""
    classes: list[str]
    left_out: list[tuple[str, str]]
    """As `Source.left_out`."""


def list_folder(root: Path) -> ListedFolder:
    """A folder's images. Says on standard error what it does not use.

    Raises:
        UsageError: as `find_images`, and where the folders are parts of a data set instead of classes.
    """
    found = find_images(root)
    require_no_splits(root, found.classes)
    paths = [str(file.relative_to(root)) for file, _ in found.images]
    require_heic_reader(paths)
    found.unused.report()
    entries = [
        Entry(key, path, file.stat().st_size, label)
        for key, path, (file, label) in zip(unique(map(key_of, paths)), paths, found.images, strict=True)
    ]
    return ListedFolder(entries, found.classes, [(str(root / name), reason) for name, reason in found.unused.all()])


def open_list(file: Path) -> Files:
    """The images that a CSV or JSON lines file names; relative paths start where it lies.

    Raises:
        UsageError: as `lists.read_list`; a line whose file is missing or no image by its name.
    """
    root = file.parent
    items, classes = read_list(file)
    keys = unique(key_of(item.path) for item in items)
    entries = []
    for key, item in zip(keys, items, strict=True):
        image = root / item.path
        if not image.is_file():
            raise UsageError(f"{file}, line {item.line}: {image} {what_is(image)}")
        if extension_of(image) not in ALL_IMAGE_EXTENSIONS:
            raise UsageError(f"{file}, line {item.line}: {item.path} is no {', '.join(ALL_IMAGE_EXTENSIONS)} file")
        entries.append(Entry(key, item.path, image.stat().st_size, item.label))
    require_heic_reader(item.path for item in items)
    return Files(root, entries, classes)
