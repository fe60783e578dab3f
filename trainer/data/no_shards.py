"""What a directory holds that was named as a shard directory and has no shards: what to type instead."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from shlex import quote

from mixmae.trainer.data.extensions import ALL_IMAGE_EXTENSIONS

_LOOKED_AT = 10_000
"""Entries below the directory that are looked at for an image."""


def why_no_shards(directory: Path) -> str:
    """`it holds no .tar files`, or what it holds instead and the command or the path to type."""
    within = sorted({tar.parent.name for tar in islice(directory.glob("*/*.tar"), _LOOKED_AT)})
    if within:
        names = ", ".join(str(directory / name) for name in within[:3])
        return f"its folders hold shards; name one of them: {names}{', ...' if len(within) > 3 else ''}"
    if any(name.lower().endswith(_ENDINGS) for name in islice(_names(directory), _LOOKED_AT)):
        out = quote(f"{directory}-shards")
        return f"it holds images; 'mixmae shards build {quote(str(directory))} {out}' makes shards of them in {out}"
    return "it holds no .tar files"


_ENDINGS = tuple(f".{extension}" for extension in ALL_IMAGE_EXTENSIONS)


def _names(directory: Path) -> Iterator[str]:
    for _, _, files in os.walk(directory):
        yield from files
