"""What a directory holds that was named as a shard directory and has no shards: what to type instead."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from shlex import quote

from mixmae.trainer.data.extensions import ALL_IMAGE_EXTENSIONS
from mixmae.trainer.data.faults import first_names
from mixmae.trainer.data.splits import are_splits, build_each

_LOOKED_AT = 10_000
"""Entries below the directory that are looked at for an image."""


def why_no_shards(directory: Path) -> str:
    """`it holds no .tar files`, or what it holds instead and the command or the path to type."""
    within = sorted({tar.parent.name for tar in islice(directory.glob("*/*.tar"), _LOOKED_AT)})
    if within:
        names = ", ".join(str(directory / name) for name in within[:3])
        return f"its folders hold shards; name one of them: {names}{', ...' if len(within) > 3 else ''}"
    if any(name.lower().endswith(_ENDINGS) for name in islice(_names(directory), _LOOKED_AT)):
        return _how_to_build(directory)
    if packed := sorted(entry.name for entry in directory.iterdir() if entry.name.lower().endswith(_PACKED)):
        return f"it holds no .tar files but {first_names(packed)}; expected tars that are not compressed"
    return "it holds no .tar files"


_ENDINGS = tuple(f".{extension}" for extension in (*ALL_IMAGE_EXTENSIONS, "parquet"))
_PACKED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def _how_to_build(directory: Path) -> str:
    """Shards of a directory with images: of its parts, where it holds those of a data set."""
    parts = sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    out = f"{directory}-shards"
    if are_splits(parts):
        return f"it holds images in parts of a data set; build each on its own: {build_each(directory, parts, out)}"
    made = f"makes shards of them in {quote(out)}"
    return f"it holds images; 'mixmae shards build {quote(str(directory))} {quote(out)}' {made}"


def _names(directory: Path) -> Iterator[str]:
    for _, _, files in os.walk(directory):
        yield from files
