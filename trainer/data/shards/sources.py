"""Where the samples of new shards come from: folders of images, lists of files, or existing shards."""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.base.json_text import parse_json
from mixmae.trainer.data.annotations import ANNOTATED, ANNOTATION, AnnotationKind, merge_kinds
from mixmae.trainer.data.extensions import ALL_IMAGE_EXTENSIONS
from mixmae.trainer.data.faults import Reason, UnusableError, first_names
from mixmae.trainer.data.index import INDEX, INVALID_LABEL, LOCATION, UNLABELLED
from mixmae.trainer.data.shards.files import shard_bytes, shard_files
from mixmae.trainer.data.shards.heic import require_heic_reader
from mixmae.trainer.data.shards.image_folders import extension_of, find_images, require_no_splits
from mixmae.trainer.data.shards.labels import resolve_names
from mixmae.trainer.data.shards.lists import read_list
from mixmae.trainer.data.shards.members import DamagedTarError, Member, members
from mixmae.trainer.data.shards.scan import SampleTable
from mixmae.trainer.data.shards.unused import Unused
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
    annotation_size: int = 0
    """Bytes of the annotation: exact, except for synthetic images."""


class Source(Protocol):
    """Samples that can be read in any order and in any process; picklable."""

    entries: list[Entry]
    classes: list[str]
    annotations: AnnotationKind | None = None
    """What samples have beside their images."""
    category_ids: Sequence[int] = ()
    """COCO's numbers of the classes."""
    left_out: Sequence[tuple[str, str]] = ()
    """Names and reasons of files that are no samples."""

    def read(self, entry: Entry) -> tuple[str, bytes]:
        """The image's extension and bytes.

        Raises:
            OSError: they cannot be read.
            UnusableError: the sample has no image, or its label is invalid.
        """

    def annotation(self, entry: Entry, image: bytes) -> bytes:
        """The bytes of the sample's annotation; called where the source has some.

        Args:
            image: what `read` gave.

        Raises:
            OSError: they cannot be read.
            UnusableError: the sample has none, or it does not fit the image.
        """
        raise UnusableError(Reason.MISSING_ANNOTATION, "a source without annotations")

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
    left_out: Sequence[tuple[str, str]] = ()

    def read(self, entry: Entry) -> tuple[str, bytes]:
        file = self.root / entry.reference
        return extension_of(file), file.read_bytes()

    def locate(self, entry: Entry) -> str:
        return str(self.root / entry.reference)

    def describe(self) -> str:
        return f"files of {self.root}"


@dataclass(frozen=True)
class Shards(Source):
    """Samples of existing shards.

    References are shard, offset, extension, the reason why an image cannot be used or None, and the annotation's offset
    or None.
    """

    root: Path
    entries: list[Entry]
    classes: list[str]
    annotations: AnnotationKind | None = None
    category_ids: Sequence[int] = ()

    def read(self, entry: Entry) -> tuple[str, bytes]:
        shard, offset, extension, fault, _ = entry.reference
        if fault is not None:
            raise UnusableError(Reason(fault), "found among the shard's members")
        return extension, self._read(shard, offset, entry.size)

    def annotation(self, entry: Entry, image: bytes) -> bytes:
        shard, *_, offset = entry.reference
        if offset is None:
            raise UnusableError(Reason.MISSING_ANNOTATION, "found among the shard's members")
        return self._read(shard, offset, entry.annotation_size)

    def _read(self, shard: str, offset: int, size: int) -> bytes:
        with (self.root / shard).open("rb") as file:
            file.seek(offset)
            return file.read(size)

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
    """The samples of a directory's shards: images and labels. Says on standard error what it does not use.

    Raises:
        UsageError: a shard that is not a whole tar or cannot be read, or no samples.
    """
    unused = Unused()
    files = shard_files(root, unused)
    classes = class_names(root)
    with tqdm(total=len(files), unit="shard", desc="list", disable=None) as bar:
        listed = run_jobs(_list_shard, classes, files, jobs, bar)
    if not any(one.entries for one in listed):
        raise UsageError(f"the shards in {root} hold no samples")
    for one in listed:
        unused.merge(one.unused)
    unused.report()
    tables = [np.array([(entry.label,) for entry in one.entries], dtype=[("label", "<i4")]) for one in listed]
    classes = resolve_names(tables, [one.class_names for one in listed], classes)
    labels = [int(label) for table in tables for label in table["label"]]
    entries = [entry for one in listed for entry in one.entries]
    try:
        kind = merge_kinds([one.kind for one in listed])
    except ValueError as error:
        raise UsageError(f"{root} holds {error} files; expected one kind of annotation") from error
    if invalid := [entry.key for entry, label in zip(entries, labels, strict=True) if label == INVALID_LABEL]:
        print(
            f"unlabelled: {len(invalid)} images with a label that is no class: {first_names(invalid)}", file=sys.stderr
        )
    keys = unique(entry.key for entry in entries)
    return Shards(
        root,
        [
            entry._replace(key=key, label=max(label, UNLABELLED))
            for entry, key, label in zip(entries, keys, labels, strict=True)
        ],
        classes,
        kind,
        category_ids(root) if kind == "objects" else (),
    )


class _ListedShard(NamedTuple):
    entries: list[Entry]
    """Labels as `LabelCodes` gives them."""
    class_names: list[str]
    unused: Unused
    kind: AnnotationKind | None


def _list_shard(classes: list[str], file: Path) -> _ListedShard:
    """A shard's samples; runs in a worker process."""
    unused = Unused()
    try:
        with shard_bytes(file) as content:
            samples = SampleTable(members(file, unused), content, None, classes)
    except DamagedTarError as error:
        raise UsageError(
            f"{file} is not a whole, uncompressed tar: {error}; 'mixmae shards check {file.parent} --repair' rewrites "
            "it with the samples that can be recovered"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error}") from error
    samples.count_unused(unused)
    advance()
    found = samples.annotations
    kind, beside = (None, np.zeros(len(samples.table), ANNOTATION)) if found is None else (found.kind, found.table)
    entries = []
    for row, member, annotation in zip(samples.table, samples.members, beside, strict=True):
        unusable = int(row["state"]) if row["state"] >= min(Reason) else None
        at = int(annotation["offset"]) if kind is not None and annotation["state"] == ANNOTATED else None
        reference = (file.name, int(row["offset"]), member.extension.rpartition(".")[2], unusable, at)
        entry = Entry(_sample_key(member), reference, int(row["size"]), int(row["label"]), int(annotation["size"]))
        entries.append(entry)
    return _ListedShard(entries, samples.class_names, unused, kind)


def _sample_key(member: Member) -> str:
    """The key of an image in new shards: one whose extension is compound keeps that part of its name."""
    prefix = member.extension.rpartition(".")[0]
    return f"{member.key}_{prefix.replace('.', '_')}" if prefix else member.key


def class_names(directory: Path) -> list[str]:
    """Names of the labels 0, 1, ... in a directory's index; none where it has no index or one that cannot be read."""
    names = _index_content(directory).get("classes")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def category_ids(directory: Path) -> list[int]:
    """COCO's numbers of the classes in a directory's index; none where it has none, or none that can be read."""
    annotations = _index_content(directory).get("annotations")
    ids = annotations.get("category_ids") if isinstance(annotations, dict) else None
    return ids if isinstance(ids, list) and all(type(number) is int for number in ids) else []


def location_of_shards(directory: Path) -> Path:
    """Where the shards are whose index a directory holds: the directory itself, or what the index names.

    Raises:
        UsageError: it names a URL.
    """
    location = _index_content(directory).get(LOCATION)
    if not isinstance(location, str):
        return directory
    if is_url(location):
        raise UsageError(f"the index in {directory} is of shards behind {location}; check them where they are local")
    return Path(location)


def _index_content(directory: Path) -> dict[str, Any]:
    """What `index.json` holds; nothing where it cannot be read."""
    try:
        content = parse_json((directory / INDEX).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
