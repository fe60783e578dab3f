"""What a shard directory holds: `index.json` (shards, counts, checksums) and `samples.npy` (where each image is).

With the offsets a reader opens a tar anywhere, and any position in an epoch is found by arithmetic.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from webdataset.tariterators import base_plus_ext

from trainer.errors import UsageError

INDEX, SAMPLES = "index.json", "samples.npy"
FORMAT = 1
SAMPLE = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4")])
"""One image: its shard's number, where its bytes start in the tar, how many they are, its class or -1."""
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class Shard(NamedTuple):
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """A shard directory, opened."""

    directory: Path
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    samples: npt.NDArray[Any]
    fingerprint: str
    """Identifies the images and their order: equal fingerprints mean equal data."""

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, row: Any) -> bytes:
        """The bytes of one image, given its row of `samples`."""
        with (self.directory / self.shards[row["shard"]].name).open("rb") as file:
            file.seek(int(row["offset"]))
            return file.read(int(row["size"]))

    def name_of(self, sample: int) -> str:
        """`shard: member` of a sample, read from the tar's header; for messages."""
        row = self.samples[sample]
        shard = self.directory / self.shards[row["shard"]].name
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    if member.offset_data == row["offset"]:
                        return f"{shard.name}: {member.name}"
        except (OSError, tarfile.TarError):
            pass  # the shard itself is gone or damaged: the offset has to do for a name
        return f"{shard.name}: offset {row['offset']}"


def open_index(directory: Path) -> ShardIndex:
    """Reads a directory's index.

    Raises:
        UsageError: no directory, no index, no samples, a shard that is missing or of another size.
    """
    if not directory.is_dir():
        raise UsageError(
            f"shard directory {directory} does not exist; make one with 'mixmae shards build SRC {directory}'"
            f" or 'mixmae shards synth {directory}'"
        )
    if not (directory / INDEX).is_file():
        hint = f"run 'mixmae shards index {directory}'" if any(directory.glob("*.tar")) else "it holds no .tar files"
        raise UsageError(f"{directory} has no {INDEX}: {hint}")
    try:
        content = json.loads((directory / INDEX).read_text())
        samples = np.load(directory / SAMPLES, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the index of {directory} is damaged ({error}); run 'mixmae shards index {directory}'"
        ) from error
    if content.get("format") != FORMAT:
        raise UsageError(
            f"{directory / INDEX} has format {content.get('format')!r}, expected {FORMAT}; "
            f"run 'mixmae shards index {directory}'"
        )
    shards = tuple(Shard(**shard) for shard in content["shards"])
    for shard in shards:
        _check_size(directory, shard)
    if not len(samples):
        raise UsageError(f"the shards in {directory} hold no images")
    if len(samples) != sum(shard.samples for shard in shards):
        raise UsageError(
            f"{directory / SAMPLES} lists {len(samples)} images, {INDEX} {sum(s.samples for s in shards)}; "
            f"run 'mixmae shards index {directory}'"
        )
    return ShardIndex(directory, shards, tuple(content["classes"]), samples, content["fingerprint"])


def _check_size(directory: Path, shard: Shard) -> None:
    file = directory / shard.name
    if not file.is_file():
        raise UsageError(f"shard {file} is listed in {INDEX} but missing")
    if (size := file.stat().st_size) != shard.bytes:
        raise UsageError(
            f"shard {file} has {size} bytes, {INDEX} says {shard.bytes}; it was changed or cut short: "
            f"restore it, or run 'mixmae shards index {directory}' to accept it"
        )


def write_index(
    directory: Path, classes: Sequence[str] = (), jobs: int = 1, progress: Callable[[int], object] = lambda shards: None
) -> ShardIndex:
    """Reads every shard of a directory once and writes its index.

    Args:
        classes: names of the labels 0, 1, ...
        progress: called with 1 after each shard.

    Raises:
        UsageError: no shards, or one that is not a tar of WebDataset samples.
    """
    files = sorted(directory.glob("*.tar"))
    if not files:
        raise UsageError(f"{directory} holds no .tar files")
    shards, tables = [], []
    with ProcessPoolExecutor(jobs) as pool:
        for number, (shard, table) in enumerate(pool.map(read_shard, files)):
            table["shard"] = number
            shards.append(shard)
            tables.append(table)
            progress(1)
    samples = np.concatenate(tables)
    digest = hashlib.sha256(samples.tobytes())
    for shard in shards:
        digest.update(json.dumps(shard).encode())
    content = {
        "format": FORMAT,
        "fingerprint": digest.hexdigest(),
        "classes": list(classes),
        "shards": [shard._asdict() for shard in shards],
    }
    _replace(directory / SAMPLES, lambda file: np.save(file, samples))
    _replace(directory / INDEX, lambda file: file.write_text(json.dumps(content, indent=1) + "\n"))
    return open_index(directory)


def read_shard(file: Path) -> tuple[Shard, npt.NDArray[Any]]:
    """Counts, checksum and sample table of one shard, with shard number 0."""
    rows: list[tuple[int, int, int, int]] = []
    labels: dict[str, int] = {}
    keys: list[str] = []
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if not member.isfile() or key is None:
                    continue
                if extension.lower() in IMAGE_EXTENSIONS:
                    rows.append((0, member.offset_data, member.size, -1))
                    keys.append(key)
                elif extension == "cls":
                    payload = tar.extractfile(member)
                    assert payload is not None
                    labels[key] = int(payload.read())
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UsageError(f"{file} is not a readable, uncompressed WebDataset shard: {error}") from error
    table = np.array(rows, dtype=SAMPLE)
    table["label"] = [labels.get(key, -1) for key in keys]
    with file.open("rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    return Shard(file.name, len(rows), file.stat().st_size, checksum), table


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    partial = file.with_name("." + file.name)
    write(partial)
    partial.rename(file)
