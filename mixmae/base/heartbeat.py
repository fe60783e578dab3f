"""A rank's sign of life, in a small file that whoever started the rank reads: where it is, and that it still runs.

No torch: the reader is the launcher's. Times are of the monotonic clock, which all processes of a machine share.
"""

import mmap
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixmae.base.phases import PHASES

FILE = "MIXMAE_HEARTBEAT"
"""The environment variable with the file's path; unset where nobody reads."""
_TICK = 1.0
_LAYOUT = struct.Struct("<qqdd")


@dataclass(frozen=True)
class Beat:
    """What a rank's file says.

    Attributes:
        step: optimizer steps done since the run began.
        part: what it is at, one of `PHASES`.
        since: when it came to that part.
        ticked: when its interpreter last ran; about a second ago unless the process is stopped.
    """

    step: int
    part: str
    since: float
    ticked: float


class Heartbeat:
    """The writing side: costs a step a few memory writes, and ticks in a thread of its own."""

    def __init__(self, file: Path) -> None:
        file.write_bytes(_LAYOUT.pack(0, 0, time.monotonic(), time.monotonic()))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), _LAYOUT.size)
        self._step = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="heartbeat", daemon=True)
        self._thread.start()

    def at(self, part: str, step: int | None = None) -> None:
        """Says what the rank comes to, and how many steps it has done if that changed."""
        if step is not None:
            self._step = step
        struct.pack_into("<qqd", self._map, 0, self._step, PHASES.index(part), time.monotonic())

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _tick(self) -> None:
        while not self._ended.wait(_TICK):
            struct.pack_into("<d", self._map, _LAYOUT.size - 8, time.monotonic())


def begin_heartbeat(env: Mapping[str, str]) -> Heartbeat | None:
    """This process's heartbeat, if whoever started it reads one.

    Raises:
        OSError: the file cannot be written.
    """
    return Heartbeat(Path(env[FILE])) if FILE in env else None


def read_beat(file: Path) -> Beat | None:
    """The last sign of life in a file; None before its rank wrote any."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    if len(content) < _LAYOUT.size:
        return None
    step, part, since, ticked = _LAYOUT.unpack_from(content)
    return Beat(step, PHASES[part], since, ticked)
