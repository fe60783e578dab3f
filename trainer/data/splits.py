"""Folders and files that hold a part of a data set, such as `train`, and no class."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "unlabeled", "unlabelled"}


def is_split(name: str) -> bool:
    return name.lower() in _NAMES


def are_splits(names: Sequence[str]) -> bool:
    """Whether these names, of which there are some, are all those of parts."""
    return bool(names) and all(map(is_split, names))


def build_each(source: Path, names: Sequence[str], out: str) -> str:
    """The commands that build each part of a folder on its own: 'mixmae shards build ...' and ..."""
    return " and ".join(f"'mixmae shards build {quote(str(source / name))} {quote(f'{out}/{name}')}'" for name in names)
