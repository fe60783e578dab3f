"""No process outlives the one that started it, however that one ends."""

import os
import signal
from contextlib import suppress


class Guard:
    """A process that does nothing but wait for this one's end, and then ends a process group.

    The kernel could tell a child alone of its parent's death; its children, such as loading processes, would live on.
    To be made before any thread is.

    Args:
        ending: the signal that the group gets.
    """

    def __init__(self, ending: signal.Signals = signal.SIGKILL) -> None:
        reading, self._writing = os.pipe()
        if os.fork() == 0:
            os.close(self._writing)
            _wait_and_end(reading, ending)
        os.close(reading)

    def protect(self, group: int) -> None:
        """From now on the group is ended when this process is gone."""
        os.write(self._writing, f"{group}\n".encode())

    def release(self) -> None:
        """Nothing is left to end."""
        self.protect(0)


def _wait_and_end(reading: int, ending: signal.Signals) -> None:
    """The guard's life; never returns."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):  # whoever reads this process's output must see its end
        os.dup2(nowhere, descriptor)
    told = b"0"
    while chunk := os.read(reading, 1024):
        told = (told + chunk)[-1024:]
    group = int(told.split()[-1])
    if group:
        with suppress(ProcessLookupError):
            os.killpg(group, ending)
    os._exit(0)
