"""Batches held in memory, in place of a rank's data loader."""

import math
import multiprocessing
from collections.abc import Sequence

from mixmae.trainer.data.batch_reader import Batch
from mixmae.trainer.data.faults import FaultLog, Reason
from mixmae.trainer.data.stores.store import CacheCounts
from mixmae.trainer.data.stream import Stream


class InMemory(Stream):
    """Cycles through given batches; provides what a loop and its observer read from a stream: a workers' queue, and a
    replaced sample.
    """

    def __init__(self, batches: Sequence[Batch] = ()) -> None:
        self.retried, self.bytes_read, self.cache_counts, self.allowed = 0, 0, CacheCounts(), math.inf
        self.fault_log = FaultLog()
        self.fault_log.counts[Reason.DAMAGED] = 1
        self.given = 0
        """Number of batches so far."""
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
