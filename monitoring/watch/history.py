"""A run's state and curves from its event file, read as it grows."""

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
"""A run is stalled after both: so many seconds, and so many times the usual distance of its logged steps."""
FIRST_GAP = 120.0
"""Seconds taken for that distance before two steps were logged: models compile, caches fill."""
_RECENT = 20
"""Logged steps from which distance and speed are taken; also the events that are kept."""


class State(StrEnum):
    NOT_STARTED = "not started"
    RUNNING = "running"
    STALLED = "stalled"
    FINISHED = "finished"
    FAILED = "failed"
    PREEMPTED = "preempted"
    """Asked to stop, all saved; the same command goes on from there."""


_COUNTS = ("step", "total_steps", "world_size", "skipped_steps", "replaced_samples", "retried_reads")
"""Fields that are whole numbers; anything else there is left out."""
_LARGEST_COUNT, _LARGEST, _LAST_TIME = 2**53, 1e300, 1e11
_ENDS = {"end": State.FINISHED, "failed": State.FAILED, "preempted": State.PREEMPTED}


class Tail:
    """The lines of a file that grows: the first time all there are, later those that came since."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = 0

    def shrank(self) -> bool:
        """Whether the file was begun anew; then it is read from its start."""
        if self._file.stat().st_size >= self._offset:
            return False
        self._offset = 0
        return True

    def lines(self) -> Iterator[bytes]:
        """Whole lines only: what is still being written is left for the next time.

        Raises:
            OSError: there is no such file, or it cannot be read.
        """
        with open_regular(self._file) as stream:  # anew each time: only an open sees what other hosts wrote to NFS
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield line


@dataclass
class Log:
    """What the events up to now add up to. Steps that a resumed run does again replace those it had done."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    losses: "array[float]" = field(default_factory=lambda: array("d"))
    """By logged step; NaN where it was not finite."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """The newest logged step."""
    step: int = 0
    total_steps: int | None = None
    world_size: int | None = None
    skipped: int = 0
    resumes: int = 0
    began: float | None = None
    latest: float | None = None
    """When the first and the last event were written."""
    ended: State | None = None
    _ended_before: State | None = None
    """How the run had ended when the newest attempt at it began."""
    checkpoint: Mapping[str, Any] | None = None
    news: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """Other events than logged steps and pictures."""
    unreadable: int = 0
    """Lines that hold no event: what a killed run left of its last one, or damage."""
    _gaps: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """Seconds and optimizer steps between two logged steps of one process."""
    _previous: tuple[float, int] | None = None
    _rates: int = 0
    _inverse_rates: float = 0.0

    def read(self, line: bytes) -> None:
        event = decode(line, "event", "time")
        if event is not None and isinstance(event["event"], str) and 0 <= number(event, "time") < _LAST_TIME:
            self.take({name: value for name, value in event.items() if name not in _COUNTS or _is_count(value)})
        elif line.strip():
            self.unreadable += 1

    def take(self, event: Mapping[str, Any]) -> None:
        kind, when, step = event["event"], float(event["time"]), event.get("step")
        self.began = when if self.began is None else self.began
        self.latest = when
        if isinstance(step, int):
            self.step = step
        if kind == "step" and isinstance(step, int):
            self._take_step(event, when, step)
        elif kind in ("start", "resumed"):
            self._take_start(event)
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

    def _take_start(self, event: Mapping[str, Any]) -> None:
        self._forget_from(self.step + 1)
        self.ended = self._previous = None
        self.resumes += event["event"] == "resumed"
        self.total_steps = event.get("total_steps", self.total_steps)
        self.world_size = event.get("world_size", self.world_size)

    def _take_step(self, event: Mapping[str, Any], when: float, step: int) -> None:
        self._forget_from(step)
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

    def _forget_from(self, step: int) -> None:
        if self.steps and self.steps[-1] >= step:
            first = bisect_left(self.steps, step)
            del self.steps[first:], self.losses[first:]

    @property
    def best(self) -> tuple[float, int] | None:
        """Lowest loss and its step."""
        return min((pair for pair in zip(self.losses, self.steps, strict=True) if math.isfinite(pair[0])), default=None)

    @property
    def mean_rate(self) -> float:
        """Images per second over all logged steps, each of as many images: the harmonic mean; NaN before the first."""
        return self._rates / self._inverse_rates if self._rates else math.nan

    @property
    def seconds_per_step(self) -> float:
        """Of late, with all pauses; NaN before two logged steps."""
        steps = sum(gap[1] for gap in self._gaps)
        return sum(gap[0] for gap in self._gaps) / steps if steps else math.nan

    @property
    def patience(self) -> float:
        """Seconds without an event after which a run counts as stalled."""
        usual = statistics.median(gap[0] for gap in self._gaps) if self._gaps else FIRST_GAP
        return max(STALL_SECONDS, STALL_GAPS * usual)


def number(event: Mapping[str, Any], name: str) -> float:
    """A field of an event; NaN where it is missing, no number, or null, which stands for what is not finite."""
    value = event.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < _LARGEST else math.nan


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < _LARGEST_COUNT and value == int(value)
