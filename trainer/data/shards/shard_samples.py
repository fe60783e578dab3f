"""The samples of existing shards as a source of new ones."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.trainer.data.annotations import ANNOTATED, ANNOTATION, AnnotationKind, merge_kinds
from mixmae.trainer.data.faults import Reason, UnusableError, first_names, is_usable
from mixmae.trainer.data.index import INVALID_LABEL, UNLABELLED
from mixmae.trainer.data.shards.files import shard_bytes, shard_files
from mixmae.trainer.data.shards.index_facts import category_ids, class_names
from mixmae.trainer.data.shards.labels import resolve_names
from mixmae.trainer.data.shards.members import DamagedTarError, Member, members
from mixmae.trainer.data.shards.scan import SampleTable
from mixmae.trainer.data.shards.source import Entry, Source, unique
from mixmae.trainer.data.shards.unused import Unused
from mixmae.trainer.data.shards.workers import advance, run_jobs


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
        unusable = None if is_usable(row["state"]) else int(row["state"])
        at = int(annotation["offset"]) if kind is not None and annotation["state"] == ANNOTATED else None
        reference = (file.name, int(row["offset"]), member.extension.rpartition(".")[2], unusable, at)
        entry = Entry(_sample_key(member), reference, int(row["size"]), int(row["label"]), int(annotation["size"]))
        entries.append(entry)
    return _ListedShard(entries, samples.class_names, unused, kind)


def _sample_key(member: Member) -> str:
    """The key of an image in new shards: one whose extension is compound keeps that part of its name."""
    prefix = member.extension.rpartition(".")[0]
    return f"{member.key}_{prefix.replace('.', '_')}" if prefix else member.key
