"""Verifying shards against their index, their tar structure, their images and each other, in parallel."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.trainer.data.faults import is_usable
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.no_shards import why_no_shards
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.expected import Expected
from mixmae.trainer.data.shards.files import shard_files, total_size
from mixmae.trainer.data.shards.findings import Finding, Kind, Report, of_unused
from mixmae.trainer.data.shards.index_facts import location_of_shards
from mixmae.trainer.data.shards.labels import are_numbers, is_name
from mixmae.trainer.data.shards.shard_inspection import ShardInspection, inspect_shard, key_hash
from mixmae.trainer.data.shards.unused import Unused
from mixmae.trainer.data.shards.workers import run_jobs


class CheckResult(NamedTuple):
    """The contents of a directory as found on disk."""

    expected: Expected
    inspections: list[ShardInspection]
    report: Report


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
    findings += of_unused(str(directory), unused)
    size = total_size(files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="check", disable=None) as bar:
        inspections = run_jobs(inspect_shard, expected, names, jobs, bar)
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


def _names_among_numbers(one: ShardInspection) -> Iterator[Finding]:
    names = one.names.split("\0")
    for row in np.flatnonzero(is_name(one.table["label"]) & is_usable(one.table["state"])):
        yield Finding(Kind.BAD_LABEL, one.shard.name, names[row])


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
            yield Finding(Kind.KEY_IN_SHARDS, one.shard.name, next(k for k in keys if key_hash(k) in repeated), detail)


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".")[0]
