"""Step timer: how long each phase of a step takes, measured without waiting for the device."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_ON_DEVICE = ("forward", "backward", "optimizer")
_PENDING = 64
"""Steps whose device times are not known yet; more are forgotten."""


class StepClock:
    """Times the phases of steps, and whole steps.

    What runs on a GPU is timed by events that are read once they have passed; everything else by the host's clock.

    Args:
        on_phase: called with a phase's name when it begins, and with `between` when it has ended.
        on_phase_end: called with a phase's name and seconds, once per step that had it; on a GPU some steps later.
        on_step_end: called with a step's seconds: from the end of the one before.
    """

    def __init__(
        self,
        device: torch.device,
        on_phase: Callable[[str], None],
        on_phase_end: Callable[[str, float], None],
        on_step_end: Callable[[float], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cuda = device.type == "cuda"
        self._on_phase, self._on_phase_end, self._on_step_end = on_phase, on_phase_end, on_step_end
        self._clock = clock
        self._last: float | None = None
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._pending: deque[list[tuple[str, torch.cuda.Event, torch.cuda.Event]]] = deque(maxlen=_PENDING)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds what happens inside to a phase of the present step; after an error the rank stays in it."""
        self._on_phase(name)
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
        self._on_phase("between")

    def finish(self) -> None:
        """Ends a step."""
        now = self._clock()
        if self._last is not None:
            self._on_step_end(now - self._last)
        self._last = now
        for name, seconds in self._seconds.items():
            self._on_phase_end(name, seconds)
        self._seconds.clear()
        if self._events:
            self._pending.append(self._events)
            self._events = []
        while self._pending and self._pending[0][-1][2].query():
            self._report_passed(self._pending.popleft())

    def _report_passed(self, events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]) -> None:
        passed: dict[str, float] = {}
        for name, start, end in events:
            passed[name] = passed.get(name, 0.0) + start.elapsed_time(end) / 1000
        for name, seconds in passed.items():
            self._on_phase_end(name, seconds)
