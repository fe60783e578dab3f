"""Batches that were read before, in place of a rank's input."""

import math
import multiprocessing
from collections.abc import Sequence

from mixmae.trainer.data.faults import Reason, Tally
from mixmae.trainer.data.stores.store import CacheUse
from mixmae.trainer.data.stream import Batch, Stream


class InMemory(Stream):
    """The same batches again and again, and all that a loop and its observer ask of an input: a workers' queue, and a
    replaced sample."""

    def __init__(self, batches: Sequence[Batch] = ()) -> None:
        self.retried, self.bytes_read, self.cache_use, self.allowed = 0, 0, CacheUse(), math.inf
        self.tally = Tally()
        self.tally.counts[Reason.DAMAGED] = 1
        self.given = 0
        """Batches so far."""
        self._kept = batches
        self._queue: multiprocessing.Queue[int] = multiprocessing.Queue()

    def __next__(self) -> Batch:
        self.given += 1
        return self._kept[self.given % len(self._kept)]

    @property
    def ready(self) -> int:
        return self._queue.qsize()

    def close(self) -> None:
        self._queue.close()
