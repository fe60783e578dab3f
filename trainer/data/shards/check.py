"""Verifying shards against their index, their tar structure and their images, in parallel."""

import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.trainer.data import jpeg
from mixmae.trainer.data.annotations import ANNOTATED, EXTENSIONS, AnnotationKind
from mixmae.trainer.data.faults import PILLOW, Reason, first_names
from mixmae.trainer.data.index import INVALID_LABEL, SAMPLE, Shard, ShardIndex, Table
from mixmae.trainer.data.inspection import inspect_image
from mixmae.trainer.data.no_shards import why_no_shards
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.annotated import ShardAnnotations, missing_annotations
from mixmae.trainer.data.shards.files import ShardBytes, shard_bytes, shard_files, total_size
from mixmae.trainer.data.shards.findings import Finding, Kind, Report, kind_of
from mixmae.trainer.data.shards.index_facts import category_ids, class_names, location_of_shards
from mixmae.trainer.data.shards.labels import are_numbers, is_name, label_text
from mixmae.trainer.data.shards.members import DamagedTarError, Member, members, recover_members
from mixmae.trainer.data.shards.scan import SampleTable, checksum
from mixmae.trainer.data.shards.unused import Unused
from mixmae.trainer.data.shards.workers import advance, run_jobs


class ShardInspection(NamedTuple):
    """The contents of a shard as found on disk."""

    shard: Shard
    table: Table
    """Rows of `index.SAMPLE`, also of what can be found in a damaged tar; labels as `LabelCodes` gives them."""
    class_names: list[str]
    """Those that the table's label codes stand for."""
    names: str
    """Of the rows, separated by NUL: millions of them are held."""
    keys: npt.NDArray[np.uint64]
    """Hashes of the rows' keys."""
    findings: list[Finding]
    annotations: ShardAnnotations | None = None


class CheckResult(NamedTuple):
    """The contents of a directory as found on disk."""

    expected: "Expected"
    inspections: list[ShardInspection]
    report: Report


@dataclass(frozen=True)
class Expected:
    """What a directory should hold according to its index, if it has one."""

    directory: Path
    classes: list[str]
    shards: dict[str, tuple[Shard, Table]]
    kinds: Sequence[AnnotationKind] = tuple(EXTENSIONS)
    """Of annotations: that of the index, or any without an index."""
    annotations: dict[str, Table] = field(default_factory=dict)
    """By shard; none where the index has none."""
    category_ids: Sequence[int] = ()
    labels_are_numbers: bool = False
    """Without names; known only once all shards were read."""

    @classmethod
    def of(cls, directory: Path, index: ShardIndex | None) -> "Expected":
        if index is None:
            return cls(directory, class_names(directory), {}, category_ids=category_ids(directory))
        ends = np.cumsum([shard.samples for shard in index.shards])
        tables = np.split(index.samples, ends[:-1])
        rows = {shard.name: (shard, table) for shard, table in zip(index.shards, tables, strict=True)}
        if index.annotations is None or index.annotation_table is None:
            return cls(directory, list(index.classes), rows, ())
        beside = np.split(index.annotation_table, ends[:-1])
        annotations = {shard.name: table for shard, table in zip(index.shards, beside, strict=True)}
        return cls(directory, list(index.classes), rows, (index.annotations,), annotations, index.category_ids)

    def annotations_of(self, shard: str) -> dict[int, Any]:
        """The index's rows of a shard's usable annotations, by the offsets of their images."""
        if shard not in self.annotations:
            return {}
        offsets, rows = self.shards[shard][1]["offset"].tolist(), self.annotations[shard]
        return {offset: row for offset, row in zip(offsets, rows, strict=True) if row["state"] == ANNOTATED}

    def rows(self, shard: str, content: ShardBytes) -> Table:
        """The index rows of a shard's usable samples; none if the file was replaced by another shard.

        It still is the indexed one, however damaged, if at least half of its images that fit into the file are
        unchanged.
        """
        if shard not in self.shards:
            return np.array([], dtype=SAMPLE)
        rows = self.shards[shard][1]
        rows = rows[rows["state"] < min(Reason)]
        ranges = [(int(row["offset"]), int(row["offset"]) + int(row["size"]), row["hash"]) for row in rows]
        same = [
            xxhash.xxh3_64_intdigest(content[start:end]) == image for start, end, image in ranges if end <= len(content)
        ]
        return rows if 2 * sum(same) >= len(same) else rows[:0]


def check_shards(directory: Path, jobs: int) -> CheckResult:
    """Reads all shards of a directory and decodes all images.

    Raises:
        UsageError: no such directory, or neither shards nor an index in it.
    """
    started = time.monotonic()
    if not directory.is_dir():
        raise UsageError(f"shard directory {directory} {what_is(directory)}")
    unused = Unused()
    holder, directory = directory, location_of_shards(directory)
    files = shard_files(directory, unused)
    index, findings = _open(holder)
    if not files and index is None:
        raise UsageError(f"{directory} holds no shards: {why_no_shards(directory)}")
    expected = Expected.of(directory, index)
    names = [file.name for file in files]
    if index is not None:
        findings += [Finding(Kind.SHARD_GONE, name) for name in expected.shards if name not in set(names)]
        findings += [Finding(Kind.SHARD_UNKNOWN, name) for name in names if name not in expected.shards]
    findings += _unused(str(directory), unused)
    size = total_size(files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="check", disable=None) as bar:
        inspections = run_jobs(_inspect, expected, names, jobs, bar)
    findings += [finding for one in inspections for finding in one.findings]
    if are_numbers((one.table for one in inspections), expected.classes):
        expected = replace(expected, labels_are_numbers=True)
        findings += [finding for one in inspections for finding in _names_among_numbers(one)]
    findings += _repeated_images(inspections)
    findings += _keys_in_several(inspections)
    samples = sum(one.shard.samples for one in inspections)
    report = Report(holder, len(files), samples, size, time.monotonic() - started, findings)
    return CheckResult(expected, inspections, report)


def _open(directory: Path) -> tuple[ShardIndex | None, list[Finding]]:
    try:
        return open_index(directory), []
    except UsageError as error:
        return None, [Finding(Kind.INDEX, str(directory), detail=str(error))]


def _inspect(expected: Expected, name: str) -> ShardInspection:
    """Inspects one shard; runs in a worker process."""
    file = expected.directory / name
    try:
        with shard_bytes(file) as content:
            return _inspect_content(expected, file, content)
    except OSError as error:
        nothing = Shard(name, 0, 0, "")
        finding = Finding(Kind.SHARD_UNREADABLE, name, detail=str(error))
        return ShardInspection(nothing, np.array([], dtype=SAMPLE), [], "", np.array([], dtype=np.uint64), [finding])


def _inspect_content(expected: Expected, file: Path, content: ShardBytes) -> ShardInspection:
    unused = Unused()
    found, fault = find_members(file, unused)
    seen = 0

    def inspect(image: bytes) -> int:
        nonlocal seen
        seen += len(image)
        advance(len(image))
        return inspect_image(image)

    samples = SampleTable(found, content, inspect, expected.classes, expected.kinds)
    samples.count_unused(unused)
    table = samples.table
    advance(max(0, len(content) - seen))
    shard = Shard(file.name, len(table), len(content), checksum(content))
    names = [member.name for member in samples.members]
    findings = list(_unused(file.name, unused))
    if fault is not None:
        findings.append(Finding(Kind.TAR, file.name, detail=f"{fault}; {len(found)} whole members can be found"))
    if file.name in expected.shards:
        findings += _file_changes(shard, expected.shards[file.name][0])
        findings += _against_index(shard, samples, names, expected.rows(file.name, content), content)
    findings += _keys_twice(file.name, found)
    findings += _states(file.name, table, names, content)
    annotations = samples.annotations
    if annotations is None and expected.annotations:
        annotations = missing_annotations(expected.kinds[0], samples.members)
    if annotations is not None:
        findings += _annotations(file.name, annotations, table, names, expected.annotations_of(file.name))
    keys = np.array([_hash(member.key) for member in samples.members], np.uint64)
    return ShardInspection(shard, table, samples.class_names, "\0".join(names), np.unique(keys), findings, annotations)


def _unused(where: str, unused: Unused) -> Iterator[Finding]:
    for reason, count in unused.counts.items():
        yield Finding(
            Kind.UNUSED, where, detail=f"{count} {reason}: {first_names(unused.examples[reason], count=count)}"
        )
    for name, reason in unused.unreadable:
        yield Finding(Kind.MEMBER_UNREADABLE, where, name, reason)


def find_members(file: Path, unused: Unused | None = None) -> tuple[list[Member], DamagedTarError | None]:
    """A tar's members, and what is wrong with it; of a damaged tar the intact members.

    Args:
        unused: counts the tar's other files.

    Raises:
        OSError: it cannot be read.
    """
    unused = unused if unused is not None else Unused()
    found = Unused(most_examples=unused.most_examples)
    try:
        whole = members(file, found)
    except DamagedTarError as error:
        return recover_members(file, unused), error
    unused.merge(found)
    return whole, None


def _file_changes(shard: Shard, before: Shard) -> Iterator[Finding]:
    if shard.bytes != before.bytes:
        yield Finding(Kind.SHARD_CHANGED, shard.name, detail=f"{shard.bytes} bytes, {before.bytes} when indexed")
    elif shard.sha256 != before.sha256:
        yield Finding(Kind.SHARD_CHANGED, shard.name, detail=f"checksum {shard.sha256[:12]}, {before.sha256[:12]} then")


def _against_index(
    shard: Shard, samples: SampleTable, names: Sequence[str], rows: Table, content: ShardBytes
) -> Iterator[Finding]:
    """Compares the shard's samples with its index rows."""
    here: dict[tuple[int, int], list[tuple[Any, str]]] = {}
    for row, name in zip(samples.table, names, strict=True):  # two rows of one image where the tar has links
        here.setdefault((int(row["offset"]), int(row["size"])), []).append((row, name))
    for row in rows:
        offset = int(row["offset"])
        left = here.get((offset, int(row["size"])))
        now, name = left.pop(0) if left else (None, "")
        if now is None:
            yield Finding(Kind.IMAGE_LOST, shard.name, name_at(content, offset))
        elif now["state"] < min(Reason) and now["hash"] != row["hash"]:
            yield Finding(Kind.IMAGE_CHANGED, shard.name, name)
        elif now["state"] < min(Reason) and _is_another(now["label"], row["label"]):
            label = label_text(now["label"], samples.class_names)
            yield Finding(Kind.LABEL_CHANGED, shard.name, name, f"{label}, {row['label']} when indexed")


def _is_another(label: int, indexed: int) -> bool:
    """Whether a label is another than was indexed; what is no class, or was none then, has a finding of its own."""
    return label not in (indexed, INVALID_LABEL) and not (indexed == INVALID_LABEL and is_name(label))


def name_at(content: ShardBytes, offset: int) -> str:
    """A member's name from its header, or its offset where the header is lost."""
    try:
        return tarfile.TarInfo.frombuf(content[offset - tarfile.BLOCKSIZE : offset], "utf-8", "replace").name
    except tarfile.TarError:
        return f"image at byte {offset}"


def _keys_twice(shard: str, found: Sequence[Member]) -> Iterator[Finding]:
    for (key, extension), count in Counter((member.key, member.extension) for member in found).items():
        if count > 1:
            yield Finding(Kind.KEY_TWICE, shard, f"{key}.{extension}", f"{count} times")


def _states(shard: str, table: Table, names: Sequence[str], content: ShardBytes) -> Iterator[Finding]:
    for row, name in zip(table, names, strict=True):
        if row["state"] >= min(Reason):
            yield Finding(kind_of(Reason(row["state"])), shard, name)
        elif row["label"] == INVALID_LABEL:
            yield Finding(Kind.BAD_LABEL, shard, name)
        elif row["state"] == PILLOW:
            image = content[row["offset"] : row["offset"] + row["size"]]
            if jpeg.is_jpeg(image) and not _is_cmyk(image):
                yield Finding(Kind.WARNING, shard, name)


def _names_among_numbers(one: ShardInspection) -> Iterator[Finding]:
    names = one.names.split("\0")
    for row in np.flatnonzero(is_name(one.table["label"]) & (one.table["state"] < min(Reason))):
        yield Finding(Kind.BAD_LABEL, one.shard.name, names[row])


def _annotations(
    shard: str, found: ShardAnnotations, table: Table, names: Sequence[str], indexed: dict[int, Any]
) -> Iterator[Finding]:
    """What is wrong with a shard's annotations, and which are not those that were indexed."""
    for fault in found.faults:
        yield Finding(kind_of(fault.reason), shard, fault.name, fault.detail)
    for row, image, name in zip(found.table, table, names, strict=True):
        before = indexed.get(int(image["offset"]))
        if before is not None and row["state"] == ANNOTATED and row["hash"] != before["hash"]:
            yield Finding(Kind.ANNOTATION_CHANGED, shard, name)


def _is_cmyk(image: bytes) -> bool:
    try:
        return jpeg.read_header(image).components == 4
    except ValueError:
        return False


def _repeated_images(inspections: Sequence[ShardInspection]) -> Iterator[Finding]:
    """Images that an earlier one equals, within and across shards."""
    if not inspections:
        return
    table = np.concatenate([one.table for one in inspections])
    shards = np.repeat(np.arange(len(inspections)), [len(one.table) for one in inspections])
    starts = np.cumsum([0, *(len(one.table) for one in inspections)])
    images = np.flatnonzero(table["size"] > 0)
    order = images[np.lexsort((images, table["size"][images], table["hash"][images]))]
    same = (table["hash"][order][1:] == table["hash"][order][:-1]) & (
        table["size"][order][1:] == table["size"][order][:-1]
    )
    names: dict[int, list[str]] = {}

    def name(row: int) -> tuple[str, str]:
        shard = int(shards[row])
        if shard not in names:
            names[shard] = inspections[shard].names.split("\0")
        return inspections[shard].shard.name, names[shard][row - starts[shard]]

    for i in np.flatnonzero(same):
        first, second = name(order[i]), name(order[i + 1])
        yield Finding(Kind.SAME_IMAGE, *second, f"equals {first[0]}: {first[1]}")


def _keys_in_several(inspections: Sequence[ShardInspection]) -> Iterator[Finding]:
    if not inspections:
        return
    hashes, counts = np.unique(np.concatenate([one.keys for one in inspections]), return_counts=True)
    repeated = hashes[counts > 1]
    for one in inspections:
        if count := int(np.isin(one.keys, repeated).sum()):
            detail = f"{count} of its keys" if count > 1 else ""
            keys = (_key(name) for name in one.names.split("\0"))
            yield Finding(Kind.KEY_IN_SHARDS, one.shard.name, next(k for k in keys if _hash(k) in repeated), detail)


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".")[0]


def _hash(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode(errors="surrogateescape"))
