"""Where a step's time goes, measured without waiting for the device."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_ON_DEVICE = ("forward", "backward", "optimizer")
_PENDING = 64
"""Steps whose device times are not known yet; more are forgotten."""


class StepClock:
    """Times the parts of steps, and whole steps.

    What runs on a GPU is timed by events that are read once they have passed; everything else by the host's clock.

    Args:
        part: called with a part's name and seconds, once for each step that had it; on a GPU some steps later.
        step: called with a step's seconds: from the end of the one before.
        place: called with the part's name when it begins, and with `between` when it has ended.
    """

    def __init__(
        self,
        device: torch.device,
        part: Callable[[str, float], None],
        step: Callable[[float], None],
        place: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cuda = device.type == "cuda"
        self._tell_part, self._tell_step, self._tell_place, self._clock = part, step, place, clock
        self._last: float | None = None
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._pending: deque[list[tuple[str, torch.cuda.Event, torch.cuda.Event]]] = deque(maxlen=_PENDING)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds what happens inside to a part of the present step. After an error the part is where the rank is."""
        self._tell_place(name)
        if self._cuda and name in _ON_DEVICE:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            started = self._clock()
            yield
            self._seconds[name] += self._clock() - started
        self._tell_place("between")

    def finish(self) -> None:
        """Ends a step."""
        now = self._clock()
        if self._last is not None:
            self._tell_step(now - self._last)
        self._last = now
        for name, seconds in self._seconds.items():
            self._tell_part(name, seconds)
        self._seconds.clear()
        if self._events:
            self._pending.append(self._events)
            self._events = []
        while self._pending and self._pending[0][-1][2].query():
            self._tell_passed(self._pending.popleft())

    def _tell_passed(self, events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]) -> None:
        passed: dict[str, float] = {}
        for name, start, end in events:
            passed[name] = passed.get(name, 0.0) + start.elapsed_time(end) / 1000
        for name, seconds in passed.items():
            self._tell_part(name, seconds)
