"""A background thread that looks again and again."""

import threading
import time
from collections.abc import Callable


class Poller:
    """Calls a function every `interval` seconds in a daemon thread."""

    def __init__(self, poll: Callable[[float], None], interval: float, clock: Callable[[], float] = time.time) -> None:
        self._poll, self._interval, self._clock = poll, interval, clock
        self._stopped = threading.Event()
        self.polled = threading.Event()
        """Set after the first call."""
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._poll(self._clock())
            self.polled.set()
            self._stopped.wait(self._interval)
