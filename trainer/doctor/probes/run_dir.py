"""The run directory as seen from a host."""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mixmae.trainer.doctor.facts import RunDirFacts
from mixmae.trainer.doctor.protocol.folders import temporary_folder

_CACHING = 5.0
"""Seconds that a network file system may take to show another host's writes."""
_WRITING = 5.0
"""Seconds after which the write test stops."""
_TOKEN = "token"


@contextmanager
def probe_folder(run_dir: Path) -> Iterator[tuple[Path, str]]:
    """A folder in the run directory with a random token in it. For the main rank.

    A missing run directory is created and removed again.

    Raises:
        OSError: it cannot be created or written.
    """
    folder, token = run_dir / f".doctor-{secrets.token_hex(8)}", secrets.token_hex(16)
    with temporary_folder(run_dir):
        try:
            folder.mkdir()
            (folder / _TOKEN).write_text(token)
            yield folder, token
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def probe_run_dir(run_dir: Path, probe: Path, token: str, rank: int, size: int) -> RunDirFacts:
    """Whether this host shares the run directory, and its write throughput, measured with up to `size` bytes."""
    saw = _until(lambda: (probe / _TOKEN).is_file() and (probe / _TOKEN).read_text() == token)
    wrote, seconds, problem = _write(probe / f"host-{rank}", size) if saw else (0, 0.0, "")
    there = _nearest(run_dir)
    return RunDirFacts(
        resolved=str(run_dir.resolve()),
        filesystem=_filesystem(there),
        free=shutil.disk_usage(there).free,
        saw=saw,
        seen=False,
        problem=problem,
        wrote=wrote,
        seconds=seconds,
    )


def arrived(probe: Path, rank: int) -> bool:
    """Whether the main rank can see a host's file."""
    return _until(lambda: probe / f"host-{rank}" in probe.iterdir())


def _write(file: Path, size: int) -> tuple[int, float, str]:
    """Writes and syncs a file; returns bytes, seconds and an error message, empty on success."""
    block = os.urandom(min(size, 1 << 20))
    wrote, started = 0, time.perf_counter()
    try:
        with file.open("wb", buffering=0) as opened:
            while wrote < size and time.perf_counter() - started < _WRITING:
                if opened.write(block) < len(block):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                wrote += len(block)
            os.fsync(opened.fileno())
    except OSError as error:
        return 0, 0.0, error.strerror or str(error)
    return wrote, time.perf_counter() - started, ""


def _until(holds: Callable[[], bool]) -> bool:
    """Polls a condition that another host's write makes true, for as long as file systems may cache."""
    deadline = time.monotonic() + _CACHING
    while not (there := _quietly(holds)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return there


def _quietly(holds: Callable[[], bool]) -> bool:
    try:
        return holds()
    except OSError:  # missing, unreadable or stale
        return False


def _nearest(path: Path) -> Path:
    """The innermost existing folder of a path, with symlinks resolved."""
    return next(one for one in (path, *path.absolute().parents) if one.exists()).resolve()


def _filesystem(path: Path) -> str:
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[one] for one in (path, *path.parents) if one in mounts), "unknown")


def unusable(run_dir: Path, error: OSError) -> RunDirFacts:
    """Facts of a run directory that the main rank cannot write to."""
    there = _nearest(run_dir)
    free = shutil.disk_usage(there).free
    return RunDirFacts(str(run_dir.resolve()), _filesystem(there), free, True, True, str(error.strerror), 0, 0.0)
