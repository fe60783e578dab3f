"""The manifest of a checkpoint: what it says of itself. No torch: launchers read it too."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import xxhash

MANIFEST = "manifest.json"
_FORMAT = 2
_CHUNK = 64 * 2**20


class DamagedError(Exception):
    """A checkpoint is not what was written; the message says where."""


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file as it was written."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Progress:
    """What the training loop knows of a checkpoint.

    Attributes:
        epoch: samples seen over samples in an epoch.
        loss: mean loss at the last logged step; None before the first, or if it was not finite.
        state: the run's counters.
        position: of the data.
        metrics: figures of the task's last evaluation, by name; finite ones.
    """

    step: int
    epoch: float
    loss: float | None
    state: Mapping[str, int]
    position: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)

    def metric(self, name: str) -> float | None:
        """The logged loss, or one of `metrics`; None where it is not known."""
        return self.loss if name == "loss" else self.metrics.get(name)


@dataclass(frozen=True, kw_only=True)
class Manifest(Progress):
    """What a checkpoint says of itself.

    Attributes:
        shapes: of every parameter.
        frozen: names of the parameters that are not trained, and have no optimizer states.
        optimizer_states: names that the optimizer gives the tensors that it keeps with each trained parameter; none
            before its first step.
        optimizer_scalars: numbers that it keeps with each, by its names.
        files: one a rank, by name.
        ema: whether they also hold the moving average of the weights.
    """

    world_size: int
    zero_stage: int
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    shapes: Mapping[str, list[int]]
    frozen: list[str]
    optimizer_states: list[str]
    optimizer_scalars: Mapping[str, float]
    files: Mapping[str, FileRecord]
    ema: bool = False

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
        """Raises DamagedError unless the manifest is intact and all files are there with their sizes."""
        content = _verified_json(folder / MANIFEST)
        files = {name: FileRecord(**facts) for name, facts in content.pop("files").items()}
        for name, record in files.items():
            file = folder / name
            if not file.is_file():
                raise DamagedError(f"{name} is missing")
            if file.stat().st_size != record.bytes:
                raise DamagedError(f"{name} has {file.stat().st_size} bytes, not the {record.bytes} that were written")
        return cls(**content, files=files)


def _verified_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
        checksum = content.pop("xxh3_128")
    except FileNotFoundError as error:
        raise DamagedError(f"{file.name} is missing") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise DamagedError(f"{file.name} cannot be read") from error
    if _digest(content) != checksum:
        raise DamagedError(f"{file.name} has other content than was written")
    found = content.pop("format")
    if found == 1:
        return _from_format_1(content)
    if found != _FORMAT:
        raise DamagedError(f"{file.name} is of format {found}, and this version reads formats 1 and {_FORMAT}")
    return dict(content)


def _from_format_1(content: dict[str, Any]) -> dict[str, Any]:
    """Until optimizers were the task's choice, all parameters were trained, by AdamW."""
    steps = content.pop("optimizer_step")
    states = {"optimizer_states": ["exp_avg", "exp_avg_sq"], "optimizer_scalars": {"step": float(steps)}}
    return {**content, "frozen": [], **(states if steps else {"optimizer_states": [], "optimizer_scalars": {}})}


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def verify_file(file: Path, expected: FileRecord) -> None:
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
