"""Temporary folders. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def temporary_folder(folder: Path) -> Iterator[None]:
    """Makes a folder with its parents; removes afterwards those that were not there, unless they are in use by then.

    Raises:
        OSError: it cannot be made.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for one in missing:
                one.rmdir()
