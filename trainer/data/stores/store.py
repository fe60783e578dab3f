"""The files of one shard directory, on a file system, behind a URL or a command, read by byte ranges.

Remote files are read in blocks through a cache on this node's disk, with retries.
A store is opened before workers are forked and used in all of them, by one thread each.
"""

import errno
import os
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from pathlib import Path
from typing import NamedTuple

from mixmae.base.errors import UsageError
from mixmae.base.files import open_regular, regular_descriptor

_DESCRIPTORS = 64


class CacheCounts(NamedTuple):
    """Blocks of remote files, by where they came from: cache hits and misses."""

    found: int = 0
    """In the node's cache, or there once another process had fetched them."""
    fetched: int = 0

    def plus(self, others: "CacheCounts") -> "CacheCounts":
        return CacheCounts(self.found + others.found, self.fetched + others.fetched)

    def since(self, earlier: "CacheCounts") -> "CacheCounts":
        return CacheCounts(self.found - earlier.found, self.fetched - earlier.fetched)


class Store(ABC):
    """The files of one shard directory."""

    location: str
    directory: Path | None = None
    """Where the files are; None if they are on no file system."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._retried: Counter[int] = Counter()

    @property
    def retried(self) -> int:
        """Reads that had to be tried again, in this process so far."""
        return self._retried[os.getpid()]

    @property
    def cache_counts(self) -> CacheCounts:
        """Blocks that were wanted, in this process so far; none where files are read without a cache."""
        return CacheCounts()

    @abstractmethod
    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a file from `offset` on.

        Raises:
            FileNotFoundError: no such file.
            TimeoutError: it stalled, in every try.
            OSError: the file ends before, or cannot be read.
        """

    @abstractmethod
    def read_whole(self, name: str) -> bytes:
        """A file as it is now, past any cache; for small files. Raises what `read` does."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file. Raises what `read` does."""

    def is_local(self, name: str) -> bool:
        """Whether a file is on a file system."""
        return self.directory is not None

    def will_need(self, name: str, offset: int, size: int) -> None:  # noqa: B027  a hint may be ignored
        """Hints that a range is read soon."""

    @abstractmethod
    def forget(self, name: str, offset: int, size: int) -> None:
        """Drops cached copies of a range that turned out damaged: the next read fetches it anew."""

    @abstractmethod
    def close(self) -> None:
        """Closes what this process opened, and removes a temporary cache that it made."""


class LocalStore(Store):
    """A directory on a local or network file system."""

    directory: Path

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory))
        self.directory = directory
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, offset: int, size: int) -> bytes:
        try:
            return self._read(name, offset, size)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        self._retried[os.getpid()] += 1
        self._close(name)  # a network file system replaced the file under its name
        return self._read(name, offset, size)

    def read_whole(self, name: str) -> bytes:
        with open_regular(self._file(name)) as file:
            return file.read()

    def size(self, name: str) -> int:
        return self._file(name).stat().st_size

    def will_need(self, name: str, offset: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor(name), offset, size, os.POSIX_FADV_WILLNEED)

    def forget(self, name: str, offset: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor(name), offset, size, os.POSIX_FADV_DONTNEED)
        self._close(name)

    def close(self) -> None:
        for name in list(self._descriptors):
            self._close(name)

    def _read(self, name: str, offset: int, size: int) -> bytes:
        descriptor = self._descriptor(name)
        data = os.pread(descriptor, size, offset)
        while len(data) < size:
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"{self._file(name)} ends at {self.size(name)}, expected {offset + size}")
            data += more
        return data

    def _descriptor(self, name: str) -> int:
        if name in self._descriptors:
            self._descriptors.move_to_end(name)
        else:
            self._descriptors[name] = regular_descriptor(self._file(name))
            if len(self._descriptors) > _DESCRIPTORS:
                self._close(next(iter(self._descriptors)))
        return self._descriptors[name]

    def _close(self, name: str) -> None:
        if name in self._descriptors:
            os.close(self._descriptors.pop(name))

    def _file(self, name: str) -> Path:
        return self.directory / plain_name(name)


def is_plain(name: str) -> bool:
    """Whether a name stays within its folder."""
    return "/" not in name and "\0" not in name and name not in ("", ".", "..")


def plain_name(name: str) -> str:
    """A name that stays within its folder, as an index may come from elsewhere."""
    if not is_plain(name):
        raise UsageError(f"the index names a file {name!r}; expected a name without folders")
    return name
