"""One shard as it is found on disk: its samples, and what is wrong with them or is other than was indexed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from mixmae.trainer.data import jpeg
from mixmae.trainer.data.annotations import ANNOTATED
from mixmae.trainer.data.faults import PILLOW, Reason, is_usable
from mixmae.trainer.data.index import INVALID_LABEL, SAMPLE, Shard, Table
from mixmae.trainer.data.inspection import inspect_image
from mixmae.trainer.data.shards.annotated import ShardAnnotations, missing_annotations
from mixmae.trainer.data.shards.expected import Expected
from mixmae.trainer.data.shards.files import ShardBytes, shard_bytes
from mixmae.trainer.data.shards.findings import Finding, Kind, kind_of, of_unused
from mixmae.trainer.data.shards.labels import is_name, label_text
from mixmae.trainer.data.shards.members import Member, find_members, name_at
from mixmae.trainer.data.shards.scan import SampleTable, checksum
from mixmae.trainer.data.shards.unused import Unused
from mixmae.trainer.data.shards.workers import advance


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


def inspect_shard(expected: Expected, name: str) -> ShardInspection:
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
    findings = list(of_unused(file.name, unused))
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
    keys = np.array([key_hash(member.key) for member in samples.members], np.uint64)
    return ShardInspection(shard, table, samples.class_names, "\0".join(names), np.unique(keys), findings, annotations)


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
        elif is_usable(now["state"]) and now["hash"] != row["hash"]:
            yield Finding(Kind.IMAGE_CHANGED, shard.name, name)
        elif is_usable(now["state"]) and _is_another(now["label"], row["label"]):
            label = label_text(now["label"], samples.class_names)
            yield Finding(Kind.LABEL_CHANGED, shard.name, name, f"{label}, {row['label']} when indexed")


def _is_another(label: int, indexed: int) -> bool:
    """Whether a label is another than was indexed; what is no class, or was none then, has a finding of its own."""
    return label not in (indexed, INVALID_LABEL) and not (indexed == INVALID_LABEL and is_name(label))


def _keys_twice(shard: str, found: Sequence[Member]) -> Iterator[Finding]:
    for (key, extension), count in Counter((member.key, member.extension) for member in found).items():
        if count > 1:
            yield Finding(Kind.KEY_TWICE, shard, f"{key}.{extension}", f"{count} times")


def _states(shard: str, table: Table, names: Sequence[str], content: ShardBytes) -> Iterator[Finding]:
    for row, name in zip(table, names, strict=True):
        if not is_usable(row["state"]):
            yield Finding(kind_of(Reason(row["state"])), shard, name)
        elif row["label"] == INVALID_LABEL:
            yield Finding(Kind.BAD_LABEL, shard, name)
        elif row["state"] == PILLOW:
            image = content[row["offset"] : row["offset"] + row["size"]]
            if jpeg.is_jpeg(image) and not _is_cmyk(image):
                yield Finding(Kind.WARNING, shard, name)


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


def key_hash(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode(errors="surrogateescape"))
