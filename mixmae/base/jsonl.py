"""JSON lines: one object a line, appended by a process that may be killed, or whose disk may be full, at any byte."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmae.base.json_text import parse_json
from mixmae.base.redaction import redact

_logger = logging.getLogger(__name__)


class JsonLines:
    """A file to append to, unbuffered: a line that was written outlives the process."""

    def __init__(self, file: Path, max_waiting_bytes: int = 0) -> None:
        """Opens the file, and ends what a killed process left of a line.

        Args:
            max_waiting_bytes: of lines that wait in memory while the disk is full; by default they are dropped.
        """
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting = bytearray()
        self._torn = _ends_within_a_line(file)
        """Whether the file ends within a line."""
        self._file = file.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends an object; null where a number is not finite.

        Raises:
            OSError: it could not be written, or not all of it, and too much waits already.
        """
        if self._torn and not self._waiting:
            self._waiting += b"\n"
        self._waiting += encode(record)
        try:
            self._flush()
        except OSError:
            if len(self._waiting) > self._max_waiting_bytes:
                if not self._max_waiting_bytes:
                    self._waiting.clear()
                raise

    def close(self) -> None:
        """Raises OSError if something waits that still cannot be written."""
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        while self._waiting:
            try:
                written = self._file.write(self._waiting)
            except OSError as error:
                error.filename = str(self._file.name)
                raise
            if written:
                self._torn = self._waiting[written - 1 : written] != b"\n"
            del self._waiting[:written]


def append(file: Path, *records: Mapping[str, Any]) -> None:
    """Adds objects to a file, which is made if it is not there.

    Raises:
        OSError: not all could be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = JsonLines(file)
    try:
        for record in records:
            lines.write(record)
    finally:
        lines.close()


def encode(record: Mapping[str, Any]) -> bytes:
    """An object's line; null where a number is not finite, and without credentials."""
    return json.dumps(_shown(record), allow_nan=False).encode() + b"\n"


def decode(line: bytes, *keys: str) -> dict[str, Any] | None:
    """A line's object; None if it is none, or lacks one of `keys`."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and all(key in record for key in keys) else None


def read(file: Path, *keys: str) -> list[dict[str, Any]]:
    """All objects of a file that have these keys; none where there is no such file.

    A damaged line costs its own record alone, and is told: torn by a full disk, or two hosts' lines mixed on NFS.
    """
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    found = {number: decode(line, *keys) for number, line in enumerate(lines, 1) if line.strip()}
    damaged = [number for number, record in found.items() if record is None]
    if damaged:
        _logger.warning(
            "%s: %d of %d lines cannot be read and are left out, the first is line %d",
            file, len(damaged), len(found), damaged[0],
        )  # fmt: skip
    return [record for record in found.values() if record is not None]


def _ends_within_a_line(file: Path) -> bool:
    if not file.is_file() or not file.stat().st_size:
        return False
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() != b"\n"


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _shown(entry) for key, entry in value.items()}
    return [_shown(entry) for entry in value] if isinstance(value, list | tuple) else value
