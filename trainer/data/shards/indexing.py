"""Building the index of a shard directory: every shard is read once, every image decoded."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.base.files import atomic_write, replacing
from mixmae.base.machine import require_writable
from mixmae.trainer.data.annotations import ANNOTATIONS, Annotations, merge_kinds
from mixmae.trainer.data.decode import inspect_image
from mixmae.trainer.data.index import (
    ANNOTATED_FORMAT,
    FORMAT,
    INDEX,
    SAMPLES,
    ShardIndex,
    Table,
    fingerprint_of,
    open_index,
)
from mixmae.trainer.data.shards.annotated import missing_rows
from mixmae.trainer.data.shards.files import shard_files, total_size
from mixmae.trainer.data.shards.labels import resolve_names
from mixmae.trainer.data.shards.members import DamagedTarError
from mixmae.trainer.data.shards.scan import ScannedShard, scan_shard
from mixmae.trainer.data.shards.unused import Unused
from mixmae.trainer.data.shards.workers import advance, run_jobs


def write_index(
    directory: Path, classes: Sequence[str] = (), jobs: int = 1, unused: Unused | None = None
) -> ShardIndex:
    """Reads every shard of a directory once, decodes every image, and writes the index.

    Args:
        classes: names of the labels 0, 1, ... as far as they are known; labels that are names add to them.
        unused: counts the files that no sample uses.

    Raises:
        UsageError: no shards, or one that is not a whole tar or cannot be read.
    """
    unused = unused if unused is not None else Unused()
    require_writable(directory, "DIR")  # before hours of decoding
    files = shard_files(directory, unused)
    if not files:
        raise UsageError(f"{directory} holds no .tar files")
    with tqdm(total=total_size(files), unit="B", unit_scale=True, desc="index", disable=None) as bar:
        scanned = run_jobs(_scan, classes, files, jobs, bar)
    for one in scanned:
        unused.merge(one.unused or Unused())
        for fault in one.annotations.faults if one.annotations is not None else ():
            unused.add(f"annotations ({fault.reason.label})", f"{one.shard.name}: {fault.name}")
    if not any(one.shard.samples for one in scanned):
        raise UsageError("; ".join([f"the shards in {directory} hold no images", *unused.lines()]))
    return save_index(directory, scanned, classes)


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
    directory: Path, scanned: Sequence[ScannedShard], classes: Sequence[str], category_ids: Sequence[int] = ()
) -> ShardIndex:
    """Writes the index of scanned shards, whose class names it turns into numbers.

    Args:
        classes: names of the labels 0, 1, ... as far as they are known.
        category_ids: COCO's numbers of the classes.

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
    _save(directory / SAMPLES, samples)
    if annotations is None:
        (directory / ANNOTATIONS).unlink(missing_ok=True)
    else:
        content["annotations"] = annotations.describe()
        _save(directory / ANNOTATIONS, annotations.table)
    atomic_write(directory / INDEX, json.dumps(content, indent=1) + "\n")
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
    with replacing(file) as partial, partial.open("wb") as stream:
        np.save(stream, table)
