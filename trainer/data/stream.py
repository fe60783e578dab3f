"""The stream of batches: workers load the order's samples into uint8 batches and replace those that are unusable.

A position in it is one number, the samples seen; see `mixmae.trainer.data.order`.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mixmae.base.errors import UsageError
from mixmae.trainer.data.faults import (
    UNREACHABLE,
    Fault,
    FaultLog,
    TooManyFaultsError,
    UnusableError,
    describe,
    too_many,
)
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.order import BatchSlice, Order, SampleRange, SampleRef
from mixmae.trainer.data.rng import Purpose, numpy_at, random_at
from mixmae.trainer.data.stores.store import CacheCounts
from mixmae.trainer.data.transform import BatchBuffers, RandomResizedCropFlip, SampleTransform
from mixmae.trainer.data.workers import HandOverError, hand_over_words, init_worker
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.data import Data
from mixmae.trainer.recipe.sections.pixels import RGB

_MAX_SUBSTITUTES = 32
"""Samples tried in place of one that cannot be used."""
_MAX_OUTAGES = 3
"""Samples tried although their shards are unreachable: each may take as long as all its retries."""
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


class Batch(NamedTuple):
    """A micro-batch."""

    images: Tensor
    """uint8 [B, 3, H, W], or of the recipe's channels and type; channels last in memory, pinned for a GPU."""
    targets: dict[str, Tensor]
    """What the run's `SampleTransform` gives beside the images: "label", int64 [B], -1 where unlabelled; pinned too.
    Where samples have any number of a target, all of them one behind the other, and "counts", int64 [B]."""
    samples: list[int]
    """Index numbers of the samples, image by image."""
    faults: list[Fault]
    """Unusable samples that were replaced in this batch."""
    retried: int
    """Reads that were retried for it."""
    bytes_read: int
    """Of the encoded images and of their annotations."""
    cache_counts: CacheCounts = CacheCounts()
    """Hits and misses of the block cache for it."""
    usage_error: str | None = None
    """What the user has to change before anything can be read."""


class ToDevice:
    """uint8 [B, 3, H, W] on the host to normalised fp32 on the device, without blocking the host.

    Args:
        scale: what values are divided by before mean and deviation; images may have any channels and type.
    """

    def __init__(
        self, device: torch.device, mean: Sequence[float], std: Sequence[float], scale: float = RGB.scale
    ) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.mean = torch.tensor(mean, device=device)[:, None, None] * scale
        self.inverse_std = 1 / (torch.tensor(std, device=device)[:, None, None] * scale)

    @classmethod
    def of(cls, device: torch.device, data: Data) -> Self:
        return cls(device, data.mean, data.std, data.pixels.scale)

    def __call__(self, images: Tensor) -> Tensor:
        # A difference of uint8 and fp32 takes CPUs twenty times as long as making them alike first.
        return self._copy(images).float().sub_(self.mean).mul_(self.inverse_std)

    def _copy(self, images: Tensor) -> Tensor:
        """On a GPU beside its computing: the host is ahead, and the copy would wait behind the step before."""
        if self._copies is None:
            return images.to(self.device, non_blocking=True)
        with torch.cuda.stream(self._copies):
            copied = images.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copies)
        copied.record_stream(computing)
        return copied


class BatchReader(Dataset[Batch]):
    """Loads micro-batches; runs in the data workers."""

    def __init__(self, index: ShardIndex, transform: SampleTransform, seed: int) -> None:
        self.index, self.transform, self.seed = index, transform, seed

    def __getitems__(self, request: BatchSlice) -> Batch:
        for samples_ahead in request.prefetch:
            self._prefetch(samples_ahead)
        store = self.index.store
        retried, cache_counts = store.retried, store.cache_counts
        try:
            buffers = self.transform.new_batch(len(request.samples))
        except (RuntimeError, OSError) as error:  # of torch, where shared memory or descriptors are short
            return Batch(torch.empty(0), {}, [], [], 0, 0, usage_error=hand_over_words(error))
        samples: list[int] = []
        faults: list[Fault] = []
        try:
            for i, ref in enumerate(request.samples):
                samples.append(self._read(ref, buffers, i, faults))
            targets = buffers.collect()
        except (UsageError, MemoryError) as error:  # raised here it would reach the main process as a traceback
            why = str(error) or "a data worker ran out of memory; lower data.num_workers or data.prefetch_factor"
            return Batch(buffers.images, buffers.targets, samples, faults, 0, 0, usage_error=why)
        return Batch(
            buffers.images,
            targets,
            samples,
            faults,
            retried=store.retried - retried,
            bytes_read=self._bytes_of(samples),
            cache_counts=store.cache_counts.since(cache_counts),
        )

    def _read(self, ref: SampleRef, buffers: BatchBuffers, i: int, faults: list[Fault]) -> int:
        """Reads a sample, or the first usable one of its substitutes, into row `i`; returns which, or -1."""
        outages = 0
        for sample in self._candidates(ref):
            random = random_at(Purpose.AUGMENTATION, self.seed, ref.visit, sample)
            try:
                self._fill(sample, random, buffers, i)
            except UnusableError as error:
                if sample == ref.sample:
                    faults.append(self._fault(ref, error))
                outages += error.reason in UNREACHABLE
                if outages > _MAX_OUTAGES:
                    return -1
            else:
                return sample
        return -1

    def _fill(self, sample: int, random: Random, buffers: BatchBuffers, i: int) -> None:
        """Reads a sample into row `i`. Raises UnusableError."""
        content = self.index.read(sample) if self.transform.needs_content else b""
        row = self.index.samples[sample]
        if self.transform.reads_annotations:
            annotation = self.index.read_annotation(sample)
            self.transform.read_annotated(content, annotation, row, random, buffers, i)
        else:
            self.transform.read(content, row, random, buffers, i)

    def _bytes_of(self, samples: list[int]) -> int:
        """Bytes that were read of some samples."""
        read = int(self.index.samples["size"][samples].sum()) if self.transform.needs_content else 0
        if self.transform.reads_annotations:
            assert self.index.annotation_table is not None
            read += int(self.index.annotation_table["size"][samples].sum())
        return read

    def _candidates(self, ref: SampleRef) -> Iterator[int]:
        """The sample itself, then substitutes, which are a function of (seed, visit, sample)."""
        yield ref.sample
        generator = numpy_at(Purpose.REPLACEMENT, self.seed, ref.visit, ref.sample)
        substitutes: list[int] = generator.integers(len(self.index), size=_MAX_SUBSTITUTES).tolist()
        yield from (sample for sample in substitutes if sample != ref.sample)

    def _fault(self, ref: SampleRef, error: UnusableError) -> Fault:
        """A fault with the sample's name, for which an unreachable shard is not read again."""
        row = self.index.samples[ref.sample]
        shard = self.index.shards[row["shard"]].name
        reachable = error.reason not in UNREACHABLE
        name = self.index.name_of(ref.sample) if reachable else f"{shard}: offset {row['offset']}"
        return Fault(ref.epoch, ref.sample, error.reason, str(error), shard, name)

    def _prefetch(self, samples: SampleRange) -> None:
        first, last = self.index.samples[samples.first], self.index.samples[samples.last - 1]
        start = int(first["offset"])
        shard = self.index.shards[first["shard"]].name
        with suppress(OSError):  # only a hint; the read itself reports what is wrong
            self.index.store.will_need(shard, start, int(last["offset"]) + int(last["size"]) - start)


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
