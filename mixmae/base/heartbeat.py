"""A rank's heartbeat: which phase it is in, and, every second, that it still runs.

The launcher reads it from a small file, whose times are of the monotonic clock that all processes of a machine share;
listeners, such as the metrics, are called at each tick.
"""

import mmap
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mixmae.base.phases import PHASES

HEARTBEAT = "MIXMAE_HEARTBEAT"
"""The environment variable with the file's path; unset if nobody reads it."""
_LAYOUT = struct.Struct("<qqdd")


@dataclass(frozen=True)
class Beat:
    """The content of a rank's file.

    Attributes:
        step: optimizer steps done since the run began.
        phase: one of `PHASES`.
        since: when the phase began.
        ticked: when its interpreter last ran; about a second ago unless the process is stopped.
    """

    step: int
    phase: str
    since: float
    ticked: float


class Heartbeat:
    """The writer: a few memory writes a step, and a thread that ticks.

    A stopped process, or an interpreter that hangs without releasing its lock, stops ticking.
    """

    def __init__(self, file: Path | None = None, interval: float = 1.0) -> None:
        """Starts ticking.

        Args:
            file: read by the rank's supervisor; None without one.
            interval: seconds between two ticks.

        Raises:
            OSError: the file cannot be written.
        """
        self._map = None if file is None else _mapped(file)
        self._interval = interval
        self._step = 0
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def set_phase(self, phase: str, step: int | None = None) -> None:
        """Records that the rank enters one of `PHASES`, and its steps so far if they changed."""
        if step is not None:
            self._step = step
        if self._map is not None:
            struct.pack_into("<qqd", self._map, 0, self._step, PHASES.index(phase), time.monotonic())

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Calls `listener` now, in this thread, and then at every tick."""
        listener()
        with self._lock:
            self._listeners.append(listener)

    def remove_listener(self, listener: Callable[[], None]) -> None:
        """Returns once `listener` is not being called, and will not be again."""
        with self._lock:
            self._listeners.remove(listener)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            if self._map is not None:
                struct.pack_into("<d", self._map, _LAYOUT.size - 8, time.monotonic())
            with self._lock:
                for listener in self._listeners:
                    listener()


def _mapped(file: Path) -> mmap.mmap:
    file.write_bytes(_LAYOUT.pack(0, 0, time.monotonic(), time.monotonic()))
    with file.open("r+b") as opened:
        return mmap.mmap(opened.fileno(), _LAYOUT.size)


def begin_heartbeat(env: Mapping[str, str]) -> Heartbeat:
    """Starts this process's heartbeat, in a file if the environment names one.

    Raises:
        OSError: the file cannot be written.
    """
    return Heartbeat(Path(env[HEARTBEAT]) if HEARTBEAT in env else None)


def read_beat(file: Path) -> Beat | None:
    """The last heartbeat in a file; None before the rank has written one."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    if len(content) < _LAYOUT.size:
        return None
    step, phase, since, ticked = _LAYOUT.unpack_from(content)
    return Beat(step, PHASES[phase], since, ticked)
