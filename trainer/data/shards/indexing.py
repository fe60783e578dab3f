"""Building the index of a shard directory: every shard is read once, every image decoded."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.base.files import atomic_write, replacing
from mixmae.trainer.data.decode import inspect_image
from mixmae.trainer.data.index import FORMAT, INDEX, SAMPLES, Shard, ShardIndex, Table, fingerprint_of, open_index
from mixmae.trainer.data.shards.scan import DamagedTarError, scan_shard
from mixmae.trainer.data.shards.workers import advance, run_jobs


def write_index(directory: Path, classes: Sequence[str] = (), jobs: int = 1) -> ShardIndex:
    """Reads every shard of a directory once, decodes every image, and writes the index.

    Args:
        classes: names of the labels 0, 1, ...

    Raises:
        UsageError: no shards, or one that is not a whole tar.
    """
    files = sorted(directory.glob("*.tar"))
    if not files:
        raise UsageError(f"{directory} holds no .tar files")
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="index", disable=None) as bar:
        scanned = run_jobs(_scan, len(classes), files, jobs, bar)
    return save_index(directory, scanned, classes)


def _scan(classes: int, file: Path) -> tuple[Shard, Table]:
    def inspect(image: bytes) -> int:
        advance(len(image))
        return inspect_image(image)

    try:
        return scan_shard(file, inspect, classes)
    except DamagedTarError as error:
        raise UsageError(
            f"{file} is not a whole, uncompressed tar: {error}; see 'mixmae shards check {file.parent}'"
        ) from error


def save_index(directory: Path, scanned: Sequence[tuple[Shard, Table]], classes: Sequence[str]) -> ShardIndex:
    """Writes the index of scanned shards."""
    shards = [shard for shard, _ in scanned]
    for number, (_, table) in enumerate(scanned):
        table["shard"] = number
    samples = np.concatenate([table for _, table in scanned])
    content = {
        "format": FORMAT,
        "fingerprint": fingerprint_of(shards, classes, samples),
        "classes": list(classes),
        "shards": [shard._asdict() for shard in shards],
    }
    with replacing(directory / SAMPLES) as partial, partial.open("wb") as stream:
        np.save(stream, samples)
    atomic_write(directory / INDEX, json.dumps(content, indent=1) + "\n")
    return open_index(directory)
