"""The images of a folder, found through links, with whatever is not used counted."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.trainer.data.extensions import ALL_IMAGE_EXTENSIONS
from mixmae.trainer.data.index import UNLABELLED
from mixmae.trainer.data.shards.labels import is_class_name
from mixmae.trainer.data.shards.unused import Unused, is_junk
from mixmae.trainer.data.splits import are_splits, build_each


class FoundImages(NamedTuple):
    """Image files with their labels."""

    classes: list[str]
    images: list[tuple[Path, int]]
    """UNLABELLED for images that lie in no class folder."""
    unused: Unused


def find_images(source: Path) -> FoundImages:
    """The images in a folder, or in one folder for each class; links are followed.

    Raises:
        UsageError: no such folder, one that cannot be listed, or no images in it.
    """
    if not source.is_dir():
        raise UsageError(
            f"{source} {what_is(source)}; expected a folder of images, of one folder for each class, or of shards, "
            "or a list of images: .csv or .jsonl"
        )
    unused = Unused(most_examples=sys.maxsize)
    files = sorted(_image_files(source, unused))
    folders = [file.relative_to(source).parts[0] if file.parent != source else None for file in files]
    classes = sorted({folder for folder in folders if folder is not None})
    for name in classes:
        if not is_class_name(name):
            raise UsageError(
                f"class folder {name!r} of {source}: expected a name of up to 200 printable characters, in UTF-8; "
                "rename it"
            )
    for folder in sorted(source.iterdir()):
        if folder.is_dir() and not is_junk(folder.name) and folder.name not in classes:
            unused.add("folders without images", folder.name)
    if not files:
        found = "".join(f"; {line}" for line in unused.lines())
        raise UsageError(
            f"{source} holds no images ({', '.join(ALL_IMAGE_EXTENSIONS)}), alone or in class folders{found}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [UNLABELLED if folder is None else numbers[folder] for folder in folders]
    return FoundImages(classes, list(zip(files, labels, strict=True)), unused)


def require_no_splits(source: Path, folders: Sequence[str]) -> None:
    """Accepts a folder whose folders with images are not the parts of a data set: `train`, `val`, `test`.

    Raises:
        UsageError: they are, and would become classes.
    """
    if not are_splits(folders):
        return
    raise UsageError(
        f"{source} holds {', '.join(f'{name}/' for name in folders)}: parts of a data set, expected classes; build "
        f"each on its own: {build_each(source, folders, 'OUT')} (where they are classes, list the images in a .csv "
        "with the header 'path,label')"
    )


def extension_of(file: Path) -> str:
    return file.suffix.lower().removeprefix(".")


def _image_files(source: Path, unused: Unused) -> Iterator[Path]:
    """Regular files with an image's extension, at any depth."""
    for file in _walk(source, (), unused):
        name = str(file.relative_to(source))
        if not file.exists():
            unused.add_unreadable("links to nothing", name)
        elif not file.is_file():
            unused.add("entries that are neither files nor folders", name)
        elif extension_of(file) in ALL_IMAGE_EXTENSIONS:
            yield file
        else:
            unused.add(f"{file.suffix} files" if file.suffix else "files without an extension", name)


def _walk(folder: Path, above: tuple[tuple[int, int], ...], unused: Unused) -> Iterator[Path]:
    """All entries but folders; `above` holds the device and inode of the folders that are being walked."""
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UsageError(f"cannot list the images in {folder}: {error.strerror or error}") from error
    here = (*above, (status.st_dev, status.st_ino))
    for entry in entries:
        path = folder / entry.name
        if is_junk(entry.name):
            unused.add("hidden files or folders", entry.name)
        elif not entry.is_dir():
            yield path
        elif (entry.stat().st_dev, entry.stat().st_ino) in here:
            unused.add("links back to a folder that they lie in", entry.name)
        else:
            yield from _walk(path, here, unused)
