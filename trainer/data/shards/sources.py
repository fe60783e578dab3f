"""Where the samples of new shards come from: folders of images, lists of files, or existing shards."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.trainer.data.faults import Reason, UnusableError, first_names
from mixmae.trainer.data.index import INDEX
from mixmae.trainer.data.shards.lists import read_list
from mixmae.trainer.data.shards.scan import IMAGE_EXTENSIONS, DamagedTarError, group, label_of, mapped, members
from mixmae.trainer.data.shards.workers import advance, run_jobs

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Entry(NamedTuple):
    """A sample to be written."""

    key: str
    """WebDataset's, unique in its source."""
    reference: Any
    """How its source finds it; JSON-serialisable."""
    size: int
    """Bytes of the image: exact, except for synthetic images."""
    label: int
    """-1: none."""


class Source(Protocol):
    """Samples that can be read in any order and in any process; picklable."""

    entries: list[Entry]
    classes: list[str]

    def read(self, entry: Entry) -> tuple[str, bytes]:
        """The image's extension and bytes.

        Raises:
            OSError: they cannot be read.
            UnusableError: the sample has no image, or its label is invalid.
        """

    def locate(self, entry: Entry) -> str:
        """Where a user finds the sample, for messages."""

    def describe(self) -> str:
        """What the source is: equal for equal sources."""


@dataclass(frozen=True)
class Files(Source):
    """Image files; references are paths relative to `root`."""

    root: Path
    entries: list[Entry]
    classes: list[str]

    def read(self, entry: Entry) -> tuple[str, bytes]:
        file = self.root / entry.reference
        return _extension(file), file.read_bytes()

    def locate(self, entry: Entry) -> str:
        return str(self.root / entry.reference)

    def describe(self) -> str:
        return f"files of {self.root}"


@dataclass(frozen=True)
class Shards(Source):
    """Samples of existing shards; references are shard, offset, extension and, where it cannot be used, the reason."""

    root: Path
    entries: list[Entry]
    classes: list[str]

    def read(self, entry: Entry) -> tuple[str, bytes]:
        shard, offset, extension, fault = entry.reference
        if fault is not None:
            raise UnusableError(Reason(fault), "found among the shard's members")
        with (self.root / shard).open("rb") as file:
            file.seek(offset)
            return extension, file.read(entry.size)

    def locate(self, entry: Entry) -> str:
        shard, offset, *_ = entry.reference
        return f"{self.root / shard}: {entry.key} at byte {offset}"

    def describe(self) -> str:
        return f"shards of {self.root}"


def open_source(location: str, jobs: int = 1) -> Source:
    """The source that a path is: a directory of shards or of images, or a list of files.

    Args:
        jobs: processes that list the members of shards.

    Raises:
        UsageError: nothing of that kind, or nothing in it.
    """
    path = Path(location)
    if is_url(location):
        raise UsageError(f"source {location} is a URL; shards are built where the images are local")
    if path.suffix.lower() in (".csv", ".jsonl") and path.is_file():
        return open_list(path.resolve())
    if path.is_file():
        raise UsageError(f"{path} is no source; expected a folder of images or of shards, or a list: .csv or .jsonl")
    if path.is_dir() and any(path.glob("*.tar")):
        return open_shards(path.resolve(), jobs)
    return open_folder(path.resolve())


def is_url(location: str) -> bool:
    return "://" in location or location.startswith("pipe:")


def open_folder(root: Path) -> Files:
    """Images in a folder, or in one folder for each class.

    Raises:
        UsageError: as `find_images`.
    """
    classes, images = find_images(root)
    paths = [str(file.relative_to(root)) for file, _ in images]
    keys = unique(map(key_of, paths))
    entries = [
        Entry(key, path, file.stat().st_size, label)
        for key, path, (file, label) in zip(keys, paths, images, strict=True)
    ]
    return Files(root, entries, classes)


def find_images(source: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Class names and (file, label) of a folder of class folders; of a folder of images: no classes, label -1.

    Raises:
        UsageError: no such folder, no images in it, or images beside class folders.
    """
    if not source.is_dir():
        raise UsageError(
            f"{source} does not exist; expected a folder of images, of one folder for each class, or of shards, "
            "or a list of images: .csv or .jsonl"
        )
    files = [file for file in sorted(source.rglob("*")) if file.is_file() and not _is_junk(file.relative_to(source))]
    flat = [(file, -1) for file in files if _is_image(file) and file.parent == source]
    inside = [file for file in files if _is_image(file) and file.parent != source]
    classes = sorted({file.relative_to(source).parts[0] for file in inside})
    numbers = {name: number for number, name in enumerate(classes)}
    images = [(file, numbers[file.relative_to(source).parts[0]]) for file in inside]
    passed = Counter(file.suffix or file.name for file in files if not _is_image(file))
    if passed:
        kinds = first_names([f"{count} {kind}" for kind, count in passed.most_common()])
        print(f"{passed.total()} files are no {', '.join(IMAGE_EXTENSIONS)} and stay behind: {kinds}", file=sys.stderr)
    if not images and not flat:
        raise UsageError(f"{source} holds no images ({', '.join(IMAGE_EXTENSIONS)}), alone or in class folders")
    if images and flat:
        raise UsageError(f"{source} holds images, such as {flat[0][0].name}, beside class folders; move them into one")
    return (classes, images) if images else ([], flat)


def _is_junk(path: Path) -> bool:
    """Whether a path lies in a hidden folder, or one that archivers and notebooks leave."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _is_image(file: Path) -> bool:
    return _extension(file) in IMAGE_EXTENSIONS and file.is_file()


def _extension(file: Path) -> str:
    return file.suffix.lower().removeprefix(".")


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
            raise UsageError(f"{file}, line {item.line}: {image} does not exist")
        if _extension(image) not in IMAGE_EXTENSIONS:
            raise UsageError(f"{file}, line {item.line}: {item.path} is no {', '.join(IMAGE_EXTENSIONS)} file")
        entries.append(Entry(key, item.path, image.stat().st_size, item.label))
    return Files(root, entries, classes)


def unique(keys: Iterable[str]) -> Iterator[str]:
    """The keys, made unique: repeated ones get the suffixes `-2`, `-3`, ..."""
    taken: set[str] = set()
    last: Counter[str] = Counter()
    for key in keys:
        own = key
        while own in taken:
            last[key] = max(2, last[key] + 1)
            own = f"{key}-{last[key]}"
        taken.add(own)
        yield own


def key_of(path: str) -> str:
    """The WebDataset key of a relative path."""
    readable = _CONTROL.sub("_", os.fsencode(path).decode("utf-8", "replace"))
    folders = [part for part in PurePosixPath(readable).parts[:-1] if part not in ("/", "..")]
    # A WebDataset key ends at the first dot of the file's name.
    return "/".join([*folders, PurePosixPath(readable).stem.replace(".", "_")])


def open_shards(root: Path, jobs: int) -> Shards:
    """The samples of a directory's shards: images and labels. Says on standard error what other members it passes over.

    Raises:
        UsageError: a shard that is not a whole tar, or no samples.
    """
    classes = class_names(root)
    listed, others = [], Counter[str]()
    files = sorted(root.glob("*.tar"))
    with tqdm(total=len(files), unit="shard", desc="list", disable=None) as bar:
        for entries, passed in run_jobs(_list_shard, len(classes), files, jobs, bar):
            listed += entries
            others += passed
    if not listed:
        raise UsageError(f"the shards in {root} hold no samples")
    if others:
        kinds = first_names([f".{extension}" for extension, _ in others.most_common()])
        print(f"{others.total()} members that are neither image nor label stay behind: {kinds}", file=sys.stderr)
    keys = unique(entry.key for entry in listed)
    return Shards(root, [entry._replace(key=key) for key, entry in zip(keys, listed, strict=True)], classes)


def _list_shard(classes: int, file: Path) -> tuple[list[Entry], Counter[str]]:
    """A shard's samples, and its members that are neither image nor label, by extension."""
    try:
        found = list(members(file))
    except DamagedTarError as error:
        raise UsageError(
            f"{file} is not a whole, uncompressed tar: {error}; 'mixmae shards check {file.parent} --repair' rewrites "
            "it with the samples that can be recovered"
        ) from error
    advance()
    entries = []
    with mapped(file) as content:
        for key, files in group(found).items():
            label = label_of(files, content, classes)
            known = -1 if label is None else label
            images = [member for member in files.values() if member.extension in IMAGE_EXTENSIONS]
            for image in images:
                fault = Reason.BAD_LABEL.value if label is None else None
                entries.append(Entry(key, (file.name, image.offset, image.extension, fault), image.size, known))
            if not images:
                first = next(iter(files.values()))
                entries.append(Entry(key, (file.name, first.offset, first.extension, Reason.MISSING.value), 0, -1))
    return entries, Counter(m.extension for m in found if m.extension not in (*IMAGE_EXTENSIONS, "cls"))


def class_names(directory: Path) -> list[str]:
    """Names of the labels 0, 1, ... in a directory's index; none where it has no index or one that cannot be read."""
    try:
        content = json.loads((directory / INDEX).read_bytes())
    except (OSError, ValueError):
        return []
    names = content.get("classes") if isinstance(content, dict) else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
