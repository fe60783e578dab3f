"""The manifest of a checkpoint: metadata, sizes and checksums. Free of torch, because login nodes read it too."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import xxhash
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mixmae.base.json_text import parse_json

MANIFEST = "manifest.json"
_FORMAT = 2
_CHUNK = 64 * 2**20


class DamagedError(Exception):
    """A file of a checkpoint is missing or corrupt; the message names it."""


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a checkpoint file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Progress:
    """Training progress that the loop saves with each checkpoint.

    Attributes:
        epoch: samples seen over samples per epoch.
        loss: mean loss at the last logged step; None before the first, or if it was not finite.
        state: training counters.
        position: position in the data.
        metrics: finite metrics of the task's last evaluation, by name.
    """

    step: int
    epoch: float
    loss: float | None
    state: Mapping[str, Any]
    position: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)

    def metric(self, name: str) -> float | None:
        """The logged loss, or one of `metrics`; None if unknown."""
        return self.loss if name == "loss" else self.metrics.get(name)


@dataclass(frozen=True, kw_only=True)
class Manifest(Progress):
    """Metadata of a checkpoint.

    Attributes:
        shapes: shape of every parameter, by name.
        frozen: names of the frozen parameters, which have no optimizer states.
        optimizer_states: names of the optimizer's state tensors of each trained parameter; none before its first step.
        optimizer_scalars: the optimizer's scalar states, such as `step`, by name.
        files: sizes and checksums by file name, one file per rank.
        ema: whether the files also hold the moving average of the weights.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
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
        """The checkpoint's files, starting with that of rank `first`."""
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
        """Raises DamagedError unless the manifest is intact and all files exist with the recorded sizes."""
        try:
            manifest = TypeAdapter(cls).validate_python(_verified_json(folder / MANIFEST))
        except ValidationError as error:
            field = ".".join(map(str, error.errors()[0]["loc"]))
            raise DamagedError(f"{MANIFEST} has a {field} that no checkpoint has") from error
        if not manifest.files:
            raise DamagedError(f"{MANIFEST} names no files")
        for name, record in manifest.files.items():
            file = folder / name
            if Path(name).name != name or not file.is_file():
                raise DamagedError(f"{name} is missing")
            if file.stat().st_size != record.bytes:
                raise DamagedError(f"{name} has {file.stat().st_size} bytes, expected {record.bytes}")
        return manifest


def _verified_json(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_text())
        checksum = content.pop("xxh3_128")
    except FileNotFoundError as error:
        raise DamagedError(f"{file.name} is missing") from error
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise DamagedError(f"{file.name} cannot be read") from error
    if _digest(content) != checksum:
        raise DamagedError(f"{file.name} does not match its checksum")
    found = content.pop("format", None)
    if found == 1:
        return _from_format_1(content)
    if found != _FORMAT:
        raise DamagedError(f"{file.name} has format {found}, this version of mixmae reads formats 1 and {_FORMAT}")
    return dict(content)


def _from_format_1(content: dict[str, Any]) -> dict[str, Any]:
    """Converts format 1, in which all parameters were trained, by AdamW."""
    steps = int(content.pop("optimizer_step", 0))
    states = {"optimizer_states": ["exp_avg", "exp_avg_sq"], "optimizer_scalars": {"step": float(steps)}}
    return {**content, "frozen": [], **(states if steps else {"optimizer_states": [], "optimizer_scalars": {}})}


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def verify_file(file: Path, expected: FileRecord) -> None:
    """Raises DamagedError if the file does not match its checksum."""
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DamagedError(f"{file.name} cannot be read ({error.strerror})") from error
    if digest.hexdigest() != expected.xxh3_128:
        raise DamagedError(f"{file.name} does not match its checksum")
