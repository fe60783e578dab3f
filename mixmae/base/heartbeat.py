"""A rank's heartbeat: a small file with its phase and step, which the rank's supervisor reads.

Times are of the monotonic clock, which all processes of a machine share.
"""

import mmap
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixmae.base.phases import PHASES

HEARTBEAT = "MIXMAE_HEARTBEAT"
"""The environment variable with the file's path; unset if nobody reads it."""
_TICK = 1.0
_LAYOUT = struct.Struct("<qqdd")


@dataclass(frozen=True)
class Beat:
    """The content of a rank's file.

    Attributes:
        step: optimizer steps done since the run began.
        phase: one of `PHASES`.
        since: when it entered that phase.
        ticked: when its interpreter last ran: about a second ago, unless the process is stopped.
    """

    step: int
    phase: str
    since: float
    ticked: float


class Heartbeat:
    """The writer: a few memory writes a step, and a thread that ticks."""

    def __init__(self, file: Path) -> None:
        file.write_bytes(_LAYOUT.pack(0, 0, time.monotonic(), time.monotonic()))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), _LAYOUT.size)
        self._step = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="heartbeat", daemon=True)
        self._thread.start()

    def set_phase(self, phase: str, step: int | None = None) -> None:
        """Records the phase that the rank enters, and its steps so far if they changed."""
        if step is not None:
            self._step = step
        struct.pack_into("<qqd", self._map, 0, self._step, PHASES.index(phase), time.monotonic())

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _tick(self) -> None:
        while not self._ended.wait(_TICK):
            struct.pack_into("<d", self._map, _LAYOUT.size - 8, time.monotonic())


def begin_heartbeat(env: Mapping[str, str]) -> Heartbeat | None:
    """Starts this process's heartbeat if the environment names a file for it.

    Raises:
        OSError: the file cannot be written.
    """
    return Heartbeat(Path(env[HEARTBEAT])) if HEARTBEAT in env else None


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
