"""Building the index of a shard directory: every shard is read once, every image decoded."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.base.files import atomic_write, replacing
from mixmae.base.machine import require_writable
from mixmae.trainer.data.annotations import ANNOTATIONS, Annotations, merge_kinds
from mixmae.trainer.data.index import (
    ANNOTATED_FORMAT,
    FORMAT,
    INDEX,
    LOCATION,
    SAMPLES,
    ShardIndex,
    Table,
    fingerprint_of,
)
from mixmae.trainer.data.inspection import inspect_image
from mixmae.trainer.data.no_shards import why_no_shards
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.annotated import missing_rows
from mixmae.trainer.data.shards.files import shard_files, total_size
from mixmae.trainer.data.shards.labels import resolve_names
from mixmae.trainer.data.shards.members import DamagedTarError
from mixmae.trainer.data.shards.scan import ScannedShard, scan_shard
from mixmae.trainer.data.shards.unused import Unused
from mixmae.trainer.data.shards.workers import advance, run_jobs


def write_index(
    directory: Path,
    classes: Sequence[str] = (),
    jobs: int = 1,
    unused: Unused | None = None,
    output: Path | None = None,
    category_ids: Sequence[int] = (),
) -> ShardIndex:
    """Reads every shard of a directory once, decodes every image, and writes the index.

    Args:
        classes: names of the labels 0, 1, ... as far as they are known; labels that are names add to them.
        unused: counts the files that no sample uses.
        output: the directory that gets the index, which says where its shards are; None: that of the shards.
        category_ids: COCO's numbers of the classes, as far as they are known.

    Raises:
        UsageError: no shards, or one that is not a whole tar or cannot be read.
    """
    unused = unused if unused is not None else Unused()
    # Before hours of decoding.
    if output is None:
        _require_writable(directory)
    else:
        require_writable(output, "--output")
    files = shard_files(directory, unused)
    if not files:
        raise UsageError(f"{directory} holds no shards: {why_no_shards(directory)}")
    with tqdm(total=total_size(files), unit="B", unit_scale=True, desc="index", disable=None) as bar:
        scanned = run_jobs(_scan, classes, files, jobs, bar)
    for one in scanned:
        unused.merge(one.unused or Unused())
        for fault in one.annotations.faults if one.annotations is not None else ():
            unused.add(f"annotations ({fault.reason.label})", f"{one.shard.name}: {fault.name}")
    if not any(one.shard.samples for one in scanned):
        raise UsageError("; ".join([f"the shards in {directory} hold no images", *unused.lines()]))
    if output is None:
        return save_index(directory, scanned, classes, category_ids)
    output.mkdir(parents=True, exist_ok=True)
    return save_index(output, scanned, classes, category_ids, location=str(directory.resolve()))


def _require_writable(directory: Path) -> None:
    try:
        require_writable(directory, "DIR")
    except UsageError as error:
        raise UsageError(f"{error}; or keep its index elsewhere: --output DIR") from error


def _scan(classes: Sequence[str], file: Path) -> ScannedShard:
    def inspect(image: bytes) -> int:
        advance(len(image))
        return inspect_image(image)

    try:
        return scan_shard(file, inspect, classes)
    except DamagedTarError as error:
        raise UsageError(
            f"{file} is not a whole, uncompressed tar: {error}; see 'mixmae shards check {file.parent}'"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error}; see 'mixmae shards check {file.parent}'") from error


def save_index(
    directory: Path,
    scanned: Sequence[ScannedShard],
    classes: Sequence[str],
    category_ids: Sequence[int] = (),
    location: str | None = None,
) -> ShardIndex:
    """Writes the index of scanned shards, whose class names it turns into numbers.

    Args:
        classes: names of the labels 0, 1, ... as far as they are known.
        category_ids: COCO's numbers of the classes.
        location: of the shards, where they are not in the directory.

    Raises:
        UsageError: shards with annotations of two kinds.
    """
    shards = [one.shard for one in scanned]
    tables = [one.table for one in scanned]
    for number, table in enumerate(tables):
        table["shard"] = number
    classes = resolve_names(tables, [one.class_names for one in scanned], classes)
    samples = np.concatenate(tables)
    annotations = _annotations(scanned, category_ids)
    if annotations is not None and not classes:
        classes = [
            str(number)
            for number in range(1 + max(one.annotations.highest if one.annotations else -1 for one in scanned))
        ]
    content = {
        "format": FORMAT if annotations is None else ANNOTATED_FORMAT,
        "fingerprint": fingerprint_of(shards, classes, samples, annotations),
        "classes": classes,
        "shards": [shard._asdict() for shard in shards],
    }
    if location is not None:
        content[LOCATION] = location
    if annotations is not None:
        content["annotations"] = annotations.describe()
        _save(directory / ANNOTATIONS, annotations.table)
    with _written(directory / SAMPLES, samples):  # so that between the two renames nothing is written
        atomic_write(directory / INDEX, json.dumps(content, indent=1) + "\n")
    if annotations is None:
        (directory / ANNOTATIONS).unlink(missing_ok=True)
    return open_index(directory)


def _annotations(scanned: Sequence[ScannedShard], category_ids: Sequence[int]) -> Annotations | None:
    """The annotations of all shards; missing in shards without any, beside others that have them."""
    try:
        kind = merge_kinds([one.annotations.kind for one in scanned if one.annotations is not None])
    except ValueError as error:
        raise UsageError(f"shards with {error} files; expected one kind of annotation in a shard directory") from error
    if kind is None:
        return None
    tables = [one.annotations.table if one.annotations else missing_rows(len(one.table)) for one in scanned]
    return Annotations(kind, np.concatenate(tables), tuple(category_ids))


def _save(file: Path, table: Table) -> None:
    with _written(file, table):
        pass


@contextmanager
def _written(file: Path, table: Table) -> Iterator[None]:
    """Writes a table, which appears at the end of the block."""
    with replacing(file) as partial:
        with partial.open("wb") as stream:
            np.save(stream, table)
        yield
