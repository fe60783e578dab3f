"""A run's state and curves, read incrementally from its event file."""

import math
import statistics
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from mixmae.base.files import open_regular
from mixmae.base.jsonl import decode

STALL_SECONDS, STALL_GAPS = 60.0, 5
"""A run is stalled after both: this many seconds, and this many times the usual interval between logged steps."""
FIRST_GAP = 120.0
"""Seconds assumed for that interval before two steps were logged: models compile, caches fill."""
_RECENT = 20
"""Number of logged steps to compute interval and speed from; also of events to keep."""


class State(StrEnum):
    NOT_STARTED = "not started"
    RUNNING = "running"
    STALLED = "stalled"
    FINISHED = "finished"
    FAILED = "failed"
    PREEMPTED = "preempted"
    """Stopped by a signal, with everything saved; the same command resumes the run."""


_COUNTS = ("step", "total_steps", "world_size", "skipped_steps", "replaced_samples", "retried_reads")
"""Integer fields; other values in them are ignored."""
_LARGEST_COUNT, _LARGEST, _LAST_TIME = 2**53, 1e300, 1e11
_ENDS = {"end": State.FINISHED, "failed": State.FAILED, "preempted": State.PREEMPTED}


class Tail:
    """Reads the lines of a growing file: first all, later only new ones."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = 0

    def truncated(self) -> bool:
        """Whether the file was truncated or replaced; then it is read from its start."""
        if self._file.stat().st_size >= self._offset:
            return False
        self._offset = 0
        return True

    def lines(self) -> Iterator[bytes]:
        """Complete lines only: a line that is still being written is left for the next call.

        Raises:
            OSError: there is no such file, or it cannot be read.
        """
        with open_regular(self._file) as stream:  # reopened each time: NFS shows other hosts' writes only on open
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield line


@dataclass
class Log:
    """State accumulated from events. Steps that a resumed run repeats replace the earlier ones."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    losses: "array[float]" = field(default_factory=lambda: array("d"))
    """By logged step; NaN if not finite."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """The newest logged step."""
    step: int = 0
    total_steps: int | None = None
    world_size: int | None = None
    skipped: int = 0
    resumes: int = 0
    began: float | None = None
    latest: float | None = None
    """Times of the first and last event."""
    ended: State | None = None
    _ended_before: State | None = None
    """How the run had ended when its newest attempt began."""
    checkpoint: Mapping[str, Any] | None = None
    news: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """Recent events other than logged steps and pictures."""
    unreadable: int = 0
    """Number of lines that are no event: a truncated last line of a killed run, or damage."""
    _gaps: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """Seconds and optimizer steps between consecutive logged steps of one process."""
    _previous: tuple[float, int] | None = None
    _rates: int = 0
    _inverse_rates: float = 0.0

    def read(self, line: bytes) -> None:
        event = decode(line, "event", "time")
        if event is not None and isinstance(event["event"], str) and 0 <= number(event, "time") < _LAST_TIME:
            self.add({name: value for name, value in event.items() if name not in _COUNTS or _is_count(value)})
        elif line.strip():
            self.unreadable += 1

    def add(self, event: Mapping[str, Any]) -> None:
        kind, when, step = event["event"], float(event["time"]), event.get("step")
        self.began = when if self.began is None else self.began
        self.latest = when
        if isinstance(step, int):
            self.step = step
        if kind == "step" and isinstance(step, int):
            self._add_step(event, when, step)
        elif kind in ("start", "resumed"):
            self._add_start(event)
        elif kind == "checkpoint":
            self.checkpoint = event
        elif kind == "skipped":
            self.skipped += 1
        elif kind == "attempt":
            self._ended_before, self.ended = self.ended, None
        elif kind == "refused":
            self.ended = self._ended_before
        elif kind in _ENDS:
            self.ended = _ENDS[kind]
        if kind not in ("step", "picture"):
            self.news.append(event)

    def _add_start(self, event: Mapping[str, Any]) -> None:
        self._truncate(self.step + 1)
        self.ended = self._previous = None
        self.resumes += event["event"] == "resumed"
        self.total_steps = event.get("total_steps", self.total_steps)
        self.world_size = event.get("world_size", self.world_size)

    def _add_step(self, event: Mapping[str, Any], when: float, step: int) -> None:
        self._truncate(step)
        self.steps.append(step)
        self.losses.append(number(event, "loss"))
        self.last = event
        self.skipped = event.get("skipped_steps", self.skipped)
        if (rate := number(event, "images_per_second")) > 0:
            self._rates += 1
            self._inverse_rates += 1 / rate
        if self._previous is not None and when > self._previous[0] and step > self._previous[1]:
            self._gaps.append((when - self._previous[0], step - self._previous[1]))
        self._previous = when, step

    def _truncate(self, step: int) -> None:
        if self.steps and self.steps[-1] >= step:
            first = bisect_left(self.steps, step)
            del self.steps[first:], self.losses[first:]

    @property
    def best(self) -> tuple[float, int] | None:
        """Lowest loss and its step."""
        return min((pair for pair in zip(self.losses, self.steps, strict=True) if math.isfinite(pair[0])), default=None)

    @property
    def mean_rate(self) -> float:
        """Images per second over all logged steps: the harmonic mean; NaN before the first."""
        return self._rates / self._inverse_rates if self._rates else math.nan

    @property
    def seconds_per_step(self) -> float:
        """Over recent steps, including pauses; NaN before two logged steps."""
        steps = sum(gap[1] for gap in self._gaps)
        return sum(gap[0] for gap in self._gaps) / steps if steps else math.nan

    @property
    def stall_timeout(self) -> float:
        """Seconds without an event after which a run counts as stalled."""
        usual = statistics.median(gap[0] for gap in self._gaps) if self._gaps else FIRST_GAP
        return max(STALL_SECONDS, STALL_GAPS * usual)


def number(event: Mapping[str, Any], name: str) -> float:
    """A numeric field of an event; NaN if missing, not a number, or null (the encoding of a non-finite value)."""
    value = event.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < _LARGEST else math.nan


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < _LARGEST_COUNT and value == int(value)
