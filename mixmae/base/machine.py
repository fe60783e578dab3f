"""What a run needs of the machine it is started on, looked at before anything else is done."""

import os
import shutil
import tempfile
from pathlib import Path

from mixmae.base.errors import UsageError

SHARED_MEMORY = Path("/dev/shm")
_ROOM = 2**18
"""Bytes that a directory has to have room for: a run's first records."""


def require_writable(directory: Path, name: str) -> None:
    """Makes a directory, if it is not there, and writes and removes a file in it.

    Args:
        name: of the recipe's key or the argument that names it.

    Raises:
        UsageError: it cannot be made or written; the message says why.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".mixmae-", dir=directory) as file:
            file.write(bytes(_ROOM))
            file.flush()
    except OSError as error:
        raise UsageError(
            f"{name}={directory}: files cannot be written there ({error.strerror or error}); name another directory, "
            "or make this one writable"
        ) from error


def require_working_directory() -> None:
    """Raises UsageError where the working directory was removed, which no process can be started in."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UsageError("the working directory was removed; change to one that is there") from error


def require_temporary_folder() -> None:
    """Raises UsageError where there is no folder for temporary files."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UsageError("no folder for temporary files can be written; set TMPDIR to one") from error


def require_shared_memory(needed: int) -> None:
    """Raises UsageError unless so many bytes of shared memory are free, which data workers write batches to."""
    if needed == 0:
        return
    if not SHARED_MEMORY.is_dir():
        raise UsageError(f"{SHARED_MEMORY} is not there; mount a tmpfs on it, data workers need it")
    if not os.access(SHARED_MEMORY, os.W_OK):
        raise UsageError(f"{SHARED_MEMORY} cannot be written; mount a tmpfs on it that can, data workers need it")
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise UsageError(
            f"{SHARED_MEMORY} has {free / 1e6:.1f} MB free, expected {needed / 1e6:.1f} MB for the batches of data "
            "workers; enlarge it (mount -o remount,size=..., docker --shm-size), or lower data.prefetch_factor or "
            "data.num_workers"
        )
