"""Throughput: images per second since the last report."""

import time
from collections.abc import Callable


class Throughput:
    """Counts images against a clock; restarted by whatever is not training, such as a checkpoint."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        self._images = 0
        self._since = self._clock()

    def count(self, images: int) -> None:
        self._images += images

    def rate(self) -> float:
        """Images per second; 0 before any were counted."""
        elapsed = self._clock() - self._since
        return self._images / elapsed if elapsed > 0 else 0.0
