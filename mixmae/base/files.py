"""Files and directories that appear whole or not at all: written beside their place, then renamed into it."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def atomic_write(file: Path, content: bytes | str) -> None:
    """Writes a small file; whoever reads it, also after a power failure, finds the old content or the new one.

    Several processes may write the same file: the last one wins.

    Raises:
        OSError: the disk is full or out of reach; names `file`, which is as it was.
    """
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(partial, file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):  # which names what was written beside, or, of a full disk, nothing
            raise OSError(error.errno, error.strerror, str(file)) from error
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


def read_regular(file: Path, max_bytes: int = 2**20) -> bytes:
    """The content of a small file that somebody else may have made: no FIFO is waited for, no device read.

    Raises:
        OSError: it is not there, cannot be read, is no regular file, or is larger.
    """
    with open_regular(file) as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes", str(file))
    return content


def open_regular(file: Path) -> BinaryIO:
    """Opens a file for reading, without waiting for a FIFO's writer.

    Raises:
        OSError: it is not there, cannot be read, or is not a regular file.
    """
    return os.fdopen(regular_descriptor(file), "rb")


def regular_descriptor(file: Path) -> int:
    """As `open_regular`, for reads at offsets; the caller closes it."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(f"{file} is {_KINDS[kind]}, expected a regular file")
    return descriptor


def what_is(path: Path) -> str:
    """What a path is where something else was expected: `does not exist`, `is a directory`, `is a FIFO`, ..."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return "is a link to nothing" if path.is_symlink() else "does not exist"
    except OSError as error:
        return f"is out of reach ({error.strerror})"
    return f"is {_KINDS[kind]}"


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
