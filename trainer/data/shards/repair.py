"""Rewriting damaged shards with the samples that can be recovered. The damaged files are kept beside them."""

import gzip
import os
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import webdataset
import xxhash
from tqdm import tqdm

from mixmae.base import jsonl
from mixmae.base.errors import UsageError
from mixmae.base.files import open_regular, replacing
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.shards.check import CheckResult
from mixmae.trainer.data.shards.expected import Expected
from mixmae.trainer.data.shards.files import REPAIRS, shard_bytes
from mixmae.trainer.data.shards.findings import Kind
from mixmae.trainer.data.shards.indexing import save_index
from mixmae.trainer.data.shards.members import find_members
from mixmae.trainer.data.shards.salvage import LostSample, Salvage
from mixmae.trainer.data.shards.scan import ScannedShard, scan_shard
from mixmae.trainer.data.shards.shard_inspection import ShardInspection
from mixmae.trainer.data.shards.unused import Unused
from mixmae.trainer.data.shards.workers import advance, run_jobs

_GZIP = b"\x1f\x8b"


class RewrittenShard(NamedTuple):
    """A damaged shard after its repair."""

    name: str
    scanned: ScannedShard | None
    """None: nothing in it could be recovered."""
    original: str
    """Name of the damaged file now."""
    lost: list[LostSample]
    lost_labels: list[LostSample]
    """Samples that are kept without their labels."""


@dataclass(frozen=True)
class RepairResult:
    index: ShardIndex
    rewritten: list[RewrittenShard]

    @property
    def lost(self) -> list[LostSample]:
        return [lost for one in self.rewritten for lost in (*one.lost, *one.lost_labels)]


def repair(checked: CheckResult, jobs: int) -> RepairResult:
    """Rewrites the damaged shards of a checked directory, in parallel, and indexes it; sound shards stay as they are.

    What was done and lost is added to `repair.jsonl`.

    Raises:
        UsageError: a shard cannot be read at all, a file cannot be written, or no sample is left.
    """
    expected, findings = checked.expected, checked.report.findings
    unreadable = [finding.shard for finding in findings if finding.kind in (Kind.SHARD_UNREADABLE, Kind.SHARD_GONE)]
    if unreadable:
        raise UsageError(
            f"nothing was repaired: {unreadable[0]} is missing or cannot be read; restore it, or drop it with "
            f"'mixmae shards index {expected.directory}', and repair then"
        )
    damaged = sorted({finding.shard for finding in findings if finding.kind.remedy == "rewrite"})
    sizes = {one.shard.name: one.shard.bytes for one in checked.inspections}
    total = sum(sizes[name] for name in damaged)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="repair", disable=None) as bar:
            rewritten = run_jobs(_rewrite, expected, damaged, jobs, bar)
        _append_to_record(expected.directory / REPAIRS, rewritten)
        scanned = _scanned(checked.inspections, rewritten)
        if not scanned:
            raise UsageError(f"nothing could be saved; what was in {expected.directory} has names that end in .damaged")
        index = save_index(expected.directory, scanned, expected.classes, expected.category_ids)
        return RepairResult(index, rewritten)
    except OSError as error:
        raise UsageError(f"cannot write in {expected.directory} ({error}); fix that, and repair again") from error


def _scanned(inspections: Iterable[ShardInspection], rewritten: Iterable[RewrittenShard]) -> list[ScannedShard]:
    new = {one.name: one.scanned for one in rewritten}
    now = [
        new.get(one.shard.name, ScannedShard(one.shard, one.table, one.class_names, annotations=one.annotations))
        for one in inspections
    ]
    return [scanned for scanned in now if scanned is not None]


def _append_to_record(file: Path, rewritten: Sequence[RewrittenShard]) -> None:
    for one in rewritten:
        kept = one.scanned.shard.samples if one.scanned else 0
        counts = {"kept": kept, "lost": len(one.lost), "lost_labels": len(one.lost_labels)}
        line = {"shard": one.name, **counts, "original": one.original}
        jsonl.append(file, line, *(lost._asdict() for lost in (*one.lost, *one.lost_labels)))


def _rewrite(expected: Expected, name: str) -> RewrittenShard:
    """Rewrites one shard; runs in a worker process."""
    file = expected.directory / name
    unpacked = _unpack(file)
    unused = Unused(most_examples=sys.maxsize)
    found, fault = find_members(unpacked, unused)
    with shard_bytes(unpacked) as content:
        indexed = expected.rows(name, content)
        annotations = expected.annotations_of(name) if len(indexed) else {}
        salvaged = Salvage(
            name, content, expected.classes, indexed, expected.kinds, annotations, expected.labels_are_numbers
        )
        salvaged.collect(found, is_damaged=fault is not None)
    left_out = [(member, reason) for reason, names in unused.examples.items() for member in names]
    lost = [*salvaged.lost, *(LostSample(name, *other) for other in (*unused.unreadable, *left_out))]
    advance(file.stat().st_size)
    if unpacked != file:
        unpacked.unlink()
    original = _free_name(file)
    if not salvaged.samples:
        file.rename(original)
        return RewrittenShard(name, None, original.name, lost, salvaged.lost_labels)
    with replacing(file) as partial:
        with (
            partial.open("wb") as stream,
            webdataset.TarWriter(stream, mtime=0, user="", group="", encoder=False) as tar,
        ):
            for key, files in salvaged.samples.items():
                tar.write({"__key__": key, **files})
        states = salvaged.states
        scanned = scan_shard(
            partial, lambda image: states[xxhash.xxh3_64_intdigest(image)], expected.classes, expected.kinds
        )
        os.link(file, original)  # at every moment one of the two has the name
    scanned = scanned._replace(shard=scanned.shard._replace(name=name))
    return RewrittenShard(name, scanned, original.name, lost, salvaged.lost_labels)


def _unpack(file: Path) -> Path:
    """The file, or of a gzip-compressed one a temporary copy with as much as can be unpacked."""
    with open_regular(file) as packed:
        if packed.read(2) != _GZIP:
            return file
        packed.seek(0)
        unpacked = file.with_name(f".{file.name}.unpacked")
        with unpacked.open("wb") as stream, gzip.GzipFile(fileobj=packed) as unpacker:
            try:
                while part := unpacker.read1(2**20):
                    stream.write(part)
            except (EOFError, OSError, zlib.error):
                pass  # what was unpacked so far can be recovered; the check named the damage
    return unpacked


def _free_name(file: Path) -> Path:
    """A name for the damaged file that overwrites no earlier one."""
    free, number = file.with_name(f"{file.name}.damaged"), 1
    while free.exists():
        number += 1
        free = file.with_name(f"{file.name}.damaged-{number}")
    return free
