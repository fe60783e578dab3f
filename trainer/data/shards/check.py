"""Verifying shards against their index, their tar structure and their images, in parallel."""

import hashlib
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.trainer.data import jpeg
from mixmae.trainer.data.decode import judge
from mixmae.trainer.data.faults import PILLOW, Reason
from mixmae.trainer.data.index import SAMPLE, Shard, ShardIndex, Table, open_index
from mixmae.trainer.data.shards.findings import Finding, Kind, Report, kind_of
from mixmae.trainer.data.shards.scan import DamagedTarError, Member, mapped, members, salvage, tabulate
from mixmae.trainer.data.shards.sources import class_names
from mixmae.trainer.data.shards.workers import run_jobs, tick


class Inspected(NamedTuple):
    """A shard as it is found."""

    shard: Shard
    table: Table
    """Rows of `scan.SAMPLE`, also of what can be found in a damaged tar."""
    names: str
    """Of the rows, separated by NUL: millions of them are held."""
    keys: npt.NDArray[np.uint64]
    """Hashes of the rows' keys."""
    findings: list[Finding]


class Checked(NamedTuple):
    """A directory as it is found."""

    expected: "Expected"
    inspected: list[Inspected]
    report: Report


@dataclass(frozen=True)
class Expected:
    """What a directory should hold: what its index says, where it has one."""

    directory: Path
    classes: list[str]
    shards: dict[str, tuple[Shard, Table]]

    @classmethod
    def of(cls, directory: Path, index: ShardIndex | None) -> "Expected":
        if index is None:
            return cls(directory, class_names(directory), {})
        ends = np.cumsum([shard.samples for shard in index.shards])
        tables = np.split(index.samples, ends[:-1])
        rows = {shard.name: (shard, table) for shard, table in zip(index.shards, tables, strict=True)}
        return cls(directory, list(index.classes), rows)

    def rows(self, shard: str, content: Any) -> Table:
        """A shard's rows of usable samples in the index; none if it is another shard by now.

        It is the indexed one, however damaged, if most of the images that can be where they were are as they were.
        """
        if shard not in self.shards:
            return np.array([], dtype=SAMPLE)
        rows = self.shards[shard][1]
        rows = rows[rows["state"] < min(Reason)]
        places = [(int(row["offset"]), int(row["offset"]) + int(row["size"]), row["hash"]) for row in rows]
        same = [
            xxhash.xxh3_64_intdigest(content[start:end]) == image for start, end, image in places if end <= len(content)
        ]
        return rows if 2 * sum(same) >= len(same) else rows[:0]


def check_shards(directory: Path, jobs: int) -> Checked:
    """Reads all shards of a directory and decodes all images.

    Raises:
        UsageError: no such directory, or neither shards nor an index in it.
    """
    started = time.monotonic()
    if not directory.is_dir():
        raise UsageError(f"shard directory {directory} does not exist")
    files = sorted(directory.glob("*.tar"))
    index, findings = _open(directory)
    if not files and index is None:
        raise UsageError(f"{directory} holds no .tar files")
    expected = Expected.of(directory, index)
    names = [file.name for file in files]
    if index is not None:
        findings += [Finding(Kind.SHARD_GONE, name) for name in expected.shards if name not in set(names)]
        findings += [Finding(Kind.SHARD_UNKNOWN, name) for name in names if name not in expected.shards]
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="check", disable=None) as bar:
        inspected = run_jobs(_inspect, expected, names, jobs, bar)
    findings += [finding for one in inspected for finding in one.findings]
    findings += _repeated_images(inspected)
    findings += _keys_in_several(inspected)
    samples = sum(one.shard.samples for one in inspected)
    report = Report(directory, len(files), samples, size, time.monotonic() - started, findings)
    return Checked(expected, inspected, report)


def _open(directory: Path) -> tuple[ShardIndex | None, list[Finding]]:
    try:
        return open_index(directory), []
    except UsageError as error:
        return None, [Finding(Kind.INDEX, str(directory), detail=str(error))]


def _inspect(expected: Expected, name: str) -> Inspected:
    """One process's part: one shard."""
    file = expected.directory / name
    try:
        with mapped(file) as content:
            return _inspect_content(expected, file, content)
    except OSError as error:
        nothing = Shard(name, 0, 0, "")
        finding = Finding(Kind.SHARD_UNREADABLE, name, detail=str(error))
        return Inspected(nothing, np.array([], dtype=SAMPLE), "", np.array([], dtype=np.uint64), [finding])


def _inspect_content(expected: Expected, file: Path, content: Any) -> Inspected:
    found, fault = find_members(file)
    seen = 0

    def look(image: bytes) -> int:
        nonlocal seen
        seen += len(image)
        tick(len(image))
        return judge(image)

    table = tabulate(found, content, look, len(expected.classes))
    tick(len(content) - seen)
    shard = Shard(file.name, len(table), len(content), hashlib.sha256(content).hexdigest())
    files = {member.offset: member for member in found}
    rows = [files[int(row["offset"])] for row in table]
    names = [f"{member.key}.{member.extension}" for member in rows]
    findings = []
    if fault is not None:
        findings.append(Finding(Kind.TAR, file.name, detail=f"{fault}; {len(found)} whole members can be found"))
    if file.name in expected.shards:
        findings += _changes(shard, expected.shards[file.name][0])
        findings += _against_index(shard, table, names, expected.rows(file.name, content), content)
    findings += _keys_twice(file.name, found)
    findings += _states(file.name, table, names, content)
    keys = np.array([_hash(member.key) for member in rows], np.uint64)
    return Inspected(shard, table, "\0".join(names), np.unique(keys), findings)


def find_members(file: Path) -> tuple[list[Member], DamagedTarError | None]:
    """A tar's members, and what is wrong with it; of a damaged one those that are whole."""
    try:
        return list(members(file)), None
    except DamagedTarError as error:
        return salvage(file), error


def _changes(shard: Shard, before: Shard) -> Iterator[Finding]:
    if shard.bytes != before.bytes:
        yield Finding(Kind.SHARD_CHANGED, shard.name, detail=f"{shard.bytes} bytes, {before.bytes} when indexed")
    elif shard.sha256 != before.sha256:
        yield Finding(Kind.SHARD_CHANGED, shard.name, detail=f"checksum {shard.sha256[:12]}, {before.sha256[:12]} then")


def _against_index(shard: Shard, table: Table, names: Sequence[str], rows: Table, content: Any) -> Iterator[Finding]:
    """What became of the shard's indexed samples."""
    here = {(int(row["offset"]), int(row["size"])): (row, name) for row, name in zip(table, names, strict=True)}
    for row in rows:
        offset = int(row["offset"])
        now, name = here.get((offset, int(row["size"])), (None, ""))
        if now is None:
            yield Finding(Kind.IMAGE_LOST, shard.name, name_at(content, offset))
        elif now["state"] < min(Reason) and now["hash"] != row["hash"]:
            yield Finding(Kind.IMAGE_CHANGED, shard.name, name)
        elif now["state"] < min(Reason) and now["label"] != row["label"]:
            yield Finding(Kind.LABEL_CHANGED, shard.name, name, f"{now['label']}, {row['label']} when indexed")


def name_at(content: Any, offset: int) -> str:
    """A member's name from its header, or its offset where the header is lost."""
    try:
        return tarfile.TarInfo.frombuf(content[offset - tarfile.BLOCKSIZE : offset], "utf-8", "replace").name
    except tarfile.TarError:
        return f"image at byte {offset}"


def _keys_twice(shard: str, found: Sequence[Member]) -> Iterator[Finding]:
    for (key, extension), count in Counter((member.key, member.extension) for member in found).items():
        if count > 1:
            yield Finding(Kind.KEY_TWICE, shard, f"{key}.{extension}", f"{count} times")


def _states(shard: str, table: Table, names: Sequence[str], content: Any) -> Iterator[Finding]:
    for row, name in zip(table, names, strict=True):
        if row["state"] >= min(Reason):
            yield Finding(kind_of(Reason(row["state"])), shard, name)
        elif row["state"] == PILLOW:
            image = content[row["offset"] : row["offset"] + row["size"]]
            if jpeg.is_jpeg(image) and not _is_cmyk(image):
                yield Finding(Kind.WARNING, shard, name)


def _is_cmyk(image: bytes) -> bool:
    try:
        return jpeg.read_header(image).components == 4
    except ValueError:
        return False


def _repeated_images(inspected: Sequence[Inspected]) -> Iterator[Finding]:
    """Images that an earlier one equals, within and across shards."""
    if not inspected:
        return
    table = np.concatenate([one.table for one in inspected])
    shards = np.repeat(np.arange(len(inspected)), [len(one.table) for one in inspected])
    starts = np.cumsum([0, *(len(one.table) for one in inspected)])
    images = np.flatnonzero(table["size"] > 0)
    order = images[np.lexsort((images, table["size"][images], table["hash"][images]))]
    same = (table["hash"][order][1:] == table["hash"][order][:-1]) & (
        table["size"][order][1:] == table["size"][order][:-1]
    )
    names: dict[int, list[str]] = {}

    def name(row: int) -> tuple[str, str]:
        shard = int(shards[row])
        if shard not in names:
            names[shard] = inspected[shard].names.split("\0")
        return inspected[shard].shard.name, names[shard][row - starts[shard]]

    for place in np.flatnonzero(same):
        first, second = name(order[place]), name(order[place + 1])
        yield Finding(Kind.SAME_IMAGE, *second, f"equals {first[0]}: {first[1]}")


def _keys_in_several(inspected: Sequence[Inspected]) -> Iterator[Finding]:
    if not inspected:
        return
    hashes, counts = np.unique(np.concatenate([one.keys for one in inspected]), return_counts=True)
    repeated = hashes[counts > 1]
    for one in inspected:
        if count := int(np.isin(one.keys, repeated).sum()):
            detail = f"{count} of its keys" if count > 1 else ""
            keys = (_key(name) for name in one.names.split("\0"))
            yield Finding(Kind.KEY_IN_SHARDS, one.shard.name, next(k for k in keys if _hash(k) in repeated), detail)


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".")[0]


def _hash(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode(errors="surrogateescape"))
