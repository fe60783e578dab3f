"""A checkpoint's manifest, what is damaged, and what is on its way in or out. Names: mixmae.base.run_directory."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import xxhash

from mixmae.base.files import atomic_write
from mixmae.base.run_directory import CHECKPOINTS, NEWEST

MANIFEST = "manifest.json"
_PARTIAL, _DAMAGED = "partial-", "damaged-"
_FORMAT = 1
_CHUNK = 64 * 2**20


class DamagedError(Exception):
    """A checkpoint is not what was written; the message says where."""


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        optimizer_step: steps that the optimizer took, skipped ones not among them.
        loss: mean loss at the last logged step; None before the first, or if it was not finite.
        epoch: samples seen over samples in an epoch.
        shapes: of every parameter.
    """

    step: int
    optimizer_step: int
    epoch: float
    loss: float | None
    state: Mapping[str, int]
    position: Mapping[str, Any]
    world_size: int
    zero_stage: int
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    shapes: Mapping[str, list[int]]
    files: Mapping[str, Written]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def paths(self, folder: Path, first: int = 0) -> list[Path]:
        """The checkpoint's files, beginning with the one that rank `first` wrote."""
        names = sorted(self.files)
        start = first % len(names)
        return [folder / name for name in names[start:] + names[:start]]

    def write(self, folder: Path) -> None:
        content = {"format": _FORMAT, **asdict(self)}
        with (folder / MANIFEST).open("w") as file:
            json.dump({"xxh3_128": _digest(content), **content}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises DamagedError unless the manifest is whole and all files are there with their sizes."""
        content = _whole_json(folder / MANIFEST)
        written = {name: Written(**facts) for name, facts in content.pop("files").items()}
        for name, facts in written.items():
            file = folder / name
            if not file.is_file():
                raise DamagedError(f"{name} is missing")
            if file.stat().st_size != facts.bytes:
                raise DamagedError(f"{name} has {file.stat().st_size} bytes, not the {facts.bytes} that were written")
        return cls(**content, files=written)


def _whole_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
        checksum = content.pop("xxh3_128")
    except FileNotFoundError as error:
        raise DamagedError(f"{file.name} is missing") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise DamagedError(f"{file.name} cannot be read") from error
    if _digest(content) != checksum:
        raise DamagedError(f"{file.name} has other content than was written")
    if content.pop("format") != _FORMAT:
        raise DamagedError(f"{file.name} is of another version of this format than {_FORMAT}")
    return dict(content)


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def verify_file(file: Path, expected: Written) -> None:
    """Raises DamagedError if the file's content is not what was written."""
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DamagedError(f"{file.name} cannot be read ({error.strerror})") from error
    if digest.hexdigest() != expected.xxh3_128:
        raise DamagedError(f"{file.name} has other content than was written")


def partial_name_of(step: int, token: str) -> str:
    """The name of a checkpoint while it is written, or removed, by the start with that token."""
    return f"{_PARTIAL}{step:08d}-{token}"


def leftovers(run_dir: Path) -> list[Path]:
    """What saves that never ended left behind."""
    return [path for path in (run_dir / CHECKPOINTS).glob(f"{_PARTIAL}*") if path.is_dir()]


def lost(run_dir: Path) -> list[str]:
    """What tells that a run without any checkpoint had some: those set aside, and the pointer to the newest."""
    aside = sorted(path.name for path in (run_dir / CHECKPOINTS).glob(f"{_DAMAGED}*"))
    return [*aside, *([NEWEST] if (run_dir / CHECKPOINTS / NEWEST).exists() else [])]


def point_to(checkpoint: Path) -> None:
    """Makes a checkpoint the newest, at once or not at all."""
    atomic_write(checkpoint.parent / NEWEST, checkpoint.name + "\n")


def set_aside(checkpoint: Path) -> Path:
    """Takes a damaged checkpoint out of the history, content and all; returns where it is now."""
    aside = checkpoint.with_name(_DAMAGED + checkpoint.name)
    for attempt in range(1, 1000):
        if not aside.exists():
            break
        aside = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}-{attempt}")
    checkpoint.rename(aside)
    return aside
