"""The stream of batches: workers load the order's samples, micro-batch by micro-batch.

A position in it is one number, the samples seen; see `mixmae.trainer.data.order`.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.data import DataLoader

from mixmae.base.errors import UsageError
from mixmae.trainer.data.batch_reader import Batch, BatchReader
from mixmae.trainer.data.faults import (
    FaultLog,
    TooManyFaultsError,
    describe,
    too_many,
)
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.order import BatchSlice, Order
from mixmae.trainer.data.stores.store import CacheCounts
from mixmae.trainer.data.transform import RandomResizedCropFlip, SampleTransform
from mixmae.trainer.data.workers import HandOverError, init_worker
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe

_EXIT_NOTICE_SECONDS = 5.0
"""How long torch may take to notice the exit of a worker whose connection broke."""
_LOST_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)|Pin memory thread exited unexpectedly")
"""torch's words. The thread that pins ends where a worker died while it took that worker's batch."""


class LostWorkerError(UsageError):
    """A data worker process exited: the machine failed, not the command."""

    exit_code = 1


@dataclass(frozen=True)
class Position:
    """A run's position in its data; the same on every rank, whatever the world size."""

    seed: int
    samples: int
    fingerprint: str

    def require(self, seed: int, index: ShardIndex) -> None:
        """Raises UsageError if a run at this position cannot continue with that seed or those shards."""
        if seed != self.seed:
            raise UsageError(
                f"seed={seed}, but the run was started with {self.seed}; its order would change: set "
                f"seed={self.seed} or start another run_dir"
            )
        if index.fingerprint != self.fingerprint:
            raise UsageError(
                f"the shards in {index.store.location} are not those that the run was started with (fingerprint "
                f"{index.fingerprint[:12]}, then {self.fingerprint[:12]}); restore them or start another run_dir"
            )


class _MicroBatches:
    """One rank's endless sequence of micro-batches, as slices of the global batches."""

    def __init__(self, order: Order, first_batch: int, recipe: Recipe, ranks: Ranks) -> None:
        self.order, self.first_batch, self.micro_batch = order, first_batch, recipe.train.micro_batch
        self.streams = recipe.streams_of(ranks.rank, ranks.world_size)

    def __iter__(self) -> Iterator[BatchSlice]:
        batch = self.first_batch
        while True:
            samples, prefetch = self.order.slice_of(batch, self.streams)
            for first in range(0, len(samples), self.micro_batch):
                yield BatchSlice(samples[first : first + self.micro_batch], prefetch if first == 0 else [])
            batch += 1


class Stream:
    """Endless micro-batches of this rank from a position on. Close it, or use it as a context manager.

    Args:
        record: JSON lines file to which the names of unusable samples are appended.
        transform: what workers make of a sample; None: pretraining's random crop.
    """

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        index: ShardIndex,
        position: Position,
        record: Path | None = None,
        transform: SampleTransform | None = None,
    ) -> None:
        self.index = index
        self.rank = ranks.rank
        self.allowed = recipe.data.max_corrupt_fraction * len(index)
        self.fault_log = FaultLog(record)
        self.retried = 0
        self.bytes_read = 0
        self.cache_counts = CacheCounts()
        workers = recipe.data.num_workers
        first_batch = position.samples // recipe.train.global_batch
        loader: DataLoader[Batch] = DataLoader(
            BatchReader(index, transform or RandomResizedCropFlip(recipe.encoder.img_size, recipe.data), recipe.seed),
            batch_sampler=_MicroBatches(sample_order(recipe, index), first_batch, recipe, ranks),  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=recipe.data.prefetch_factor if workers else None,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=init_worker,
        )
        self._batches: Iterator[Batch] | None = iter(loader)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """
        Raises:
            TooManyFaultsError: this rank alone met more unusable samples in an epoch than
                `data.max_corrupt_fraction` allows.
            UsageError: what the user has to change before anything can be read.
            LostWorkerError: a worker's process ended.
        """
        assert self._batches is not None, "closed"
        try:
            batch = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            if (lost := lost_worker_error(self._torch_error(error), self.rank)) is not None:
                raise lost from error
            raise
        if isinstance(batch, HandOverError):
            raise UsageError(f"rank {self.rank}: {batch.words}")
        if batch.usage_error is not None:
            raise UsageError(batch.usage_error)
        self.retried += batch.retried
        self.bytes_read += batch.bytes_read
        self.cache_counts = self.cache_counts.plus(batch.cache_counts)
        for fault in batch.faults:
            self.fault_log.add(fault)
            if (found := self.fault_log.of_epoch(fault.epoch)).total() > self.allowed:
                raise too_many(found, self.fault_log.counts, fault.epoch, self.allowed)
        if -1 in batch.samples:
            raise TooManyFaultsError(
                f"rank {self.rank}: nothing that could have replaced an unusable sample is usable either "
                f"({describe(self.fault_log.counts)}); see 'mixmae shards check {self.index.store.location}'"
            )
        return batch

    def _torch_error(self, error: BaseException) -> BaseException:
        """Torch's own error where a dead worker's pipe broke before torch noticed its exit."""
        workers = getattr(self._batches, "_workers", [])
        if isinstance(error, RuntimeError) or not workers:
            return error
        try:
            connection.wait([worker.sentinel for worker in workers], _EXIT_NOTICE_SECONDS)
            time.sleep(0)  # torch's signal handler runs between two steps of the interpreter
        except RuntimeError as noticed:
            return noticed
        dead = [worker.pid for worker in workers if not worker.is_alive()]
        return RuntimeError(f"DataLoader worker (pid {dead[0]}) closed its connection") if dead else error

    @property
    def ready(self) -> int:
        """Micro-batches that workers have finished, pinned where there is a GPU, and nobody has taken."""
        # Torch tells it nowhere else. A thread that pins empties the workers' own queue at once into this one, which is
        # the workers' where nothing is pinned.
        finished = getattr(self._batches, "_data_queue", None)
        return finished.qsize() if finished is not None else 0

    def close(self) -> None:
        """Ends the workers; releases files and shared memory."""
        shut_down = getattr(self._batches, "_shutdown_workers", None)
        if shut_down is not None:  # an exception's traceback may hold the iterator, which ends them only when it goes
            try:
                shut_down()
            except RuntimeError as error:
                if lost_worker_error(error, self.rank) is None:
                    raise
                shut_down()  # torch reported one worker's exit while waiting for the others
        self._batches = None
        self.index.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def sample_order(recipe: Recipe, index: ShardIndex) -> Order:
    """The order of a recipe's samples.

    Raises:
        UsageError: an epoch that drops its last samples has none left.
    """
    if recipe.data.drop_last and len(index) < recipe.train.global_batch:
        raise UsageError(
            f"data.drop_last=true drops all of the {len(index)} images, which do not fill one global batch of "
            f"{recipe.train.global_batch}; lower train.global_batch or set data.drop_last=false"
        )
    counts = [shard.samples for shard in index.shards]
    data = recipe.data
    return Order(
        recipe.seed,
        counts,
        recipe.streams,
        recipe.train.global_batch,
        data.shuffle_window,
        data.drop_last,
        index.quotas,
    )


def lost_worker_error(error: BaseException, rank: int) -> LostWorkerError | None:
    """What to say of an error that is torch's for a worker that died, which it raises wherever the main thread is."""
    found = _LOST_WORKER.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    process, words = found[1] or "of a batch", str(error).splitlines()[0]
    return LostWorkerError(
        f"rank {rank}: data worker process {process} ended ({words}); if the machine ran out of memory, lower "
        "data.num_workers or data.prefetch_factor; the run resumes from its newest checkpoint"
    )


def _identity(batch: Any) -> Any:
    return batch
