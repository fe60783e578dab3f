"""Files and directories that appear whole or not at all: written beside their place, then renamed into it."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def atomic_write(file: Path, content: bytes | str) -> None:
    """Writes a small file; whoever reads it, also after a power failure, finds the old content or the new one.

    Several processes may write the same file: the last one wins.

    Raises:
        OSError: the disk is full or out of reach; `file` is as it was.
    """
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives the path of a file to write, which takes the place of `file` at the end of the block.

    For large files of one writer: what a killed process left of one is written over by the next.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        publish(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Gives an empty directory, which is called `directory` from the end of the block on, and is gone after an error.

    Raises:
        OSError: `directory` exists already and is not empty.
    """
    partial = directory.with_name(f"{directory.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(partial: Path, final: Path) -> None:
    """Renames a file or a directory, of which every byte is on disk before, and the new name after."""
    if partial.is_dir():
        for path in [*partial.rglob("*"), partial]:
            sync(path)
    else:
        sync(partial)
    partial.replace(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
