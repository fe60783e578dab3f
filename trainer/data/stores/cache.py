"""A cache of remote files' blocks on this node's disk, shared by all of its processes and bounded in bytes.

One file per block, renamed into place: a block that is here is whole, unless the disk damaged it. The least recently
used go first; a reader whose block was evicted fetches it again.
"""

import errno
import os
import shutil
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import xxhash
from filelock import FileLock

from mixmae.base.errors import UsageError

_BLOCKS = "[0-9a-f]" * 16 + "/*/[0-9]*"
_PREFIX = "mixmae-cache-"
_LOCKS = 1024
"""Locks that all blocks share, so that a cache of any size holds a bounded number of lock files."""
_TOUCH = 1.0
"""Seconds between two notes of a block's last use."""


class BlockCache:
    """A folder of blocks, each under `directory/<16 hex digits>/<file>/<number>`.

    Safe for any number of processes on one node, forked or not; a killed one blocks nobody, as the kernel frees its
    locks.
    """

    def __init__(self, directory: Path | None, max_bytes: int) -> None:
        """Opens a cache.

        Args:
            directory: None makes a temporary one, which `close` or the end of this process removes.
            max_bytes: of all blocks together.

        Raises:
            UsageError: the directory cannot be made.
        """
        self.max_bytes = max_bytes
        self._reads: Counter[int] = Counter()
        self._fetches: Counter[int] = Counter()
        self._removal: Callable[[], object] | None = None
        if directory is None:
            _remove_abandoned()
            self.directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
            self._removal = weakref.finalize(self, _remove, self.directory, os.getpid())
        else:
            self.directory = directory.absolute()
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"data.cache.dir={directory} cannot be made: {error.strerror}") from error

    @property
    def reads(self) -> int:
        """Blocks that were wanted, in this process so far."""
        return self._reads[os.getpid()]

    @property
    def fetches(self) -> int:
        """Those of them that were not here."""
        return self._fetches[os.getpid()]

    def read(self, key: str, offset: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        """`size` bytes of a block from `offset` on.

        Args:
            key: `<16 hex digits>/<file>/<number>`.
            fetch: gives the whole block, which holds the bytes wanted. Called where the block is not here or too
                short, by one process of the node at a time, while others that want the block wait.

        Raises:
            UsageError: the block is larger than the cache.
            OSError: the disk is full; whatever `fetch` raises.
        """
        self._reads[os.getpid()] += 1
        if (found := self._find(key, offset, size)) is not None:
            return found
        if self._removal is not None:  # cleaners of temporary files may have taken it
            self.directory.mkdir(mode=0o700, exist_ok=True)
        lock = FileLock(self.directory / ".locks" / f"{xxhash.xxh3_64_intdigest(key.encode()) % _LOCKS:03x}")
        with lock.acquire(poll_interval=0.01):
            if (found := self._find(key, offset, size)) is not None:
                return found
            self._fetches[os.getpid()] += 1
            block = fetch()
            self._insert(key, block)
        return block[offset : offset + size]

    def drop(self, key: str) -> None:
        """Forgets a block, if it is here."""
        (self.directory / key).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes a temporary directory, in the process that made it."""
        if self._removal is not None:
            self._removal()

    def _find(self, key: str, offset: int, size: int) -> bytes | None:
        try:
            # Opened for each read: a descriptor kept open would keep the bytes of a removed block on the disk.
            file = os.open(f"{self.directory}/{key}", os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if time.time() - os.fstat(file).st_mtime > _TOUCH:
                os.utime(file)
            data = os.pread(file, size, offset)
        finally:
            os.close(file)
        return data if len(data) == size else None

    def _insert(self, key: str, block: bytes) -> None:
        if len(block) > self.max_bytes:
            raise UsageError(
                f"data.cache.max_bytes={self.max_bytes} does not hold one block of {len(block)} bytes; raise it"
            )
        file, partial = self.directory / key, self.directory / ".partial"
        with FileLock(self.directory / ".lock").acquire(poll_interval=0.005):
            try:
                self._make_room(len(block))
                partial.write_bytes(block)
                file.parent.mkdir(parents=True, exist_ok=True)
                partial.rename(file)
            except OSError as error:
                partial.unlink(missing_ok=True)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise OSError(
                    error.errno,
                    f"the disk of the block cache {self.directory} is full before its data.cache.max_bytes="
                    f"{self.max_bytes} are; lower them, or set data.cache.dir to a larger disk",
                ) from error

    def _make_room(self, size: int) -> None:
        """Notes `size` bytes more in the count; at its limit counts anew and removes the least recently used blocks.

        The count is never below the truth: it is raised before a block is written, and not lowered by `drop`.
        """
        count = self.directory / ".bytes"
        noted = count.read_text() if count.exists() else ""
        total = int(noted) if noted.isdigit() else self.max_bytes
        if total + size > self.max_bytes:
            # A tenth at once, as counting looks at every block.
            total = self._shrink(self.max_bytes - max(size, self.max_bytes // 10))
        count.write_text(str(total + size))

    def _shrink(self, limit: int) -> int:
        """Removes the least recently used blocks down to `limit` bytes; gives the bytes that are left."""
        blocks = []
        for file in self.directory.glob(_BLOCKS):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue  # dropped meanwhile
            blocks.append((status.st_mtime_ns, status.st_size, file))
        total = sum(size for _, size, _ in blocks)
        for _, size, file in sorted(blocks):
            if total <= limit:
                break
            file.unlink(missing_ok=True)
            total -= size
        return total


def _remove_abandoned() -> None:
    """Temporary directories whose process was killed before it could remove them."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = directory.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(directory, ignore_errors=True)  # another rank may be doing the same


def _remove(directory: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)  # a worker that is being ended may still write into it
