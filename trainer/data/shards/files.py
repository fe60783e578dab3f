"""The files of a shard directory, opened so that neither a FIFO nor a file that shrinks stops a reader."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mixmae.base.errors import UsageError
from mixmae.base.files import open_regular
from mixmae.trainer.data.annotations import ANNOTATIONS
from mixmae.trainer.data.index import INDEX, SAMPLES
from mixmae.trainer.data.shards.unused import Unused

SKIPPED, REPAIRS = "skipped.jsonl", "repair.jsonl"
_OWN_FILES = (INDEX, SAMPLES, ANNOTATIONS, SKIPPED, REPAIRS, "left-out.jsonl")


def shard_files(directory: Path, unused: Unused | None = None) -> list[Path]:
    """What is called `*.tar` in a directory, sorted; counts everything else but the project's own files as unused.

    Raises:
        UsageError: the directory cannot be listed.
    """
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise UsageError(f"cannot list {directory}: {error.strerror or error}") from error
    if unused is not None:
        for entry in entries:
            if (reason := _why_no_shard(entry)) is not None:
                unused.add(reason, entry.name)
    return [entry for entry in entries if entry.suffix == ".tar" and not entry.name.startswith(".")]


def _why_no_shard(entry: Path) -> str | None:
    """Why an entry of a shard directory is not read; None for shards, and for what the project itself leaves there."""
    hidden, is_tar = entry.name.startswith("."), entry.suffix == ".tar"
    if hidden:
        return "hidden files called *.tar" if is_tar else None
    if is_tar or entry.name in _OWN_FILES or ".tar.damaged" in entry.name:
        return None
    if entry.is_dir():
        return "subdirectories of the shard directory"
    return "files of the shard directory that are not called *.tar"


def total_size(files: list[Path]) -> int:
    """Bytes of all files together; 0 for one that is not there."""
    return sum(file.stat().st_size for file in files if file.exists())


class ShardBytes:
    """A file's bytes, read by slices. A memory map would kill the process if the file were truncated meanwhile."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file, self._stream = file, stream
        self._status = self._stat()
        self._size = self._status[0]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        """
        Raises:
            OSError: the file was truncated since it was opened, or cannot be read.
        """
        start, end, _ = part.indices(self._size)
        parts = []
        while start < end:
            found = os.pread(self._stream.fileno(), end - start, start)
            if not found:
                raise OSError(f"{self._file} was truncated at byte {start} while it was read")
            parts.append(found)
            start += len(found)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def require_unchanged(self) -> None:
        """Raises OSError if the file was written to since it was opened."""
        if self._stat() != self._status:
            raise OSError(f"{self._file} was changed while it was read")

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._stream.fileno())
        return status.st_size, status.st_mtime_ns

    def blocks(self, size: int = 2**20) -> Iterator[bytes]:
        """The whole file, in blocks."""
        for start in range(0, self._size, size):
            yield self[start : start + size]


@contextmanager
def shard_bytes(file: Path) -> Iterator[ShardBytes]:
    """Opens a shard's bytes. Raises OSError as `open_regular`."""
    with open_regular(file) as stream:
        yield ShardBytes(file, stream)
