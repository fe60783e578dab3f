"""The stream of batches: workers turn the order's samples into uint8 batches; what cannot be used is replaced.

A position in it is one number, the samples seen; see `mixmae.trainer.data.order`.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mixmae.base.errors import UsageError
from mixmae.base.signals import leave_signals_to_the_main_process
from mixmae.trainer.data.decode import training_view
from mixmae.trainer.data.faults import OUT_OF_REACH, Fault, Tally, TooManyFaultsError, UnusableError, describe, too_many
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.order import Order, Share, Stretch, Ticket
from mixmae.trainer.data.rng import Purpose, numpy_at, random_at
from mixmae.trainer.data.stores.store import CacheUse
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe

_SUBSTITUTES = 32
"""Samples tried in place of one that cannot be used."""
_OUTAGES = 3
"""Samples tried although their shards are out of reach: each may take as long as all its retries."""
_NOTICE = 5.0
"""Seconds that torch has to notice a worker whose connection broke."""
_LOST = re.compile(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)")


class LostWorkerError(UsageError):
    """A data worker's process ended: the machine failed, not the call."""

    exit_code = 1


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data; the same on every rank, whatever their number."""

    seed: int
    samples: int
    fingerprint: str

    def require(self, seed: int, index: ShardIndex) -> None:
        """Raises UsageError if a run at this position cannot go on with that seed or those shards."""
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
    """uint8 [B, 3, H, W], channels last in memory, pinned where there is a GPU."""
    samples: list[int]
    """The samples that the images show."""
    faults: list[Fault]
    """What should have been in the batch and had to be replaced."""
    retried: int
    """Reads that were tried again for it."""
    bytes_read: int
    """Of the images' files."""
    cache_use: CacheUse = CacheUse()
    """Of remote shards that were wanted for it."""
    refusal: str | None = None
    """What the user has to change before anything can be read."""


class ToDevice:
    """uint8 [B, 3, H, W] on the host to normalised fp32 on the device, without blocking the host."""

    def __init__(self, device: torch.device, mean: Sequence[float], std: Sequence[float]) -> None:
        self.device = device
        self.mean = torch.tensor(mean, device=device)[:, None, None] * 255
        self.inverse_std = 1 / (torch.tensor(std, device=device)[:, None, None] * 255)

    def __call__(self, images: Tensor) -> Tensor:
        # A difference of uint8 and fp32 takes CPUs twenty times as long as making them alike first.
        return images.to(self.device, non_blocking=True).float().sub_(self.mean).mul_(self.inverse_std)


class Views(Dataset[Batch]):
    """A micro-batch's tickets to its pixels; what runs in a worker."""

    def __init__(self, index: ShardIndex, recipe: Recipe) -> None:
        self.index, self.recipe = index, recipe

    def __getitems__(self, request: Share) -> Batch:
        for stretch in request.ahead:
            self._announce(stretch)
        store = self.index.store
        retried, cache_use = store.retried, store.cache_use
        images = _empty_batch(len(request.tickets), self.recipe.encoder.img_size)
        samples: list[int] = []
        faults: list[Fault] = []
        try:
            for ticket, out in zip(request.tickets, images, strict=True):
                samples.append(self._render(ticket, out, faults))
        except UsageError as error:  # raised here it would reach the main process as a traceback
            return Batch(images, samples, faults, 0, 0, refusal=str(error))
        bytes_read = int(self.index.samples["size"][samples].sum())
        return Batch(images, samples, faults, store.retried - retried, bytes_read, store.cache_use.since(cache_use))

    def _render(self, ticket: Ticket, out: Tensor, faults: list[Fault]) -> int:
        """Draws a ticket's sample, or the first usable one of its substitutes; returns which, or -1."""
        outages = 0
        for sample in self._candidates(ticket):
            random = random_at(Purpose.VIEW, self.recipe.seed, ticket.epoch, sample)
            try:
                content = self.index.read(sample)
                state = int(self.index.samples[sample]["state"])
                training_view(content, state, self.recipe.encoder.img_size, self.recipe.data, random, out)
            except UnusableError as error:
                if sample == ticket.sample:
                    faults.append(self._fault(ticket, error))
                outages += error.reason in OUT_OF_REACH
                if outages > _OUTAGES:
                    return -1
            else:
                return sample
        return -1

    def _candidates(self, ticket: Ticket) -> Iterator[int]:
        """The ticket's sample, then others that are a function of the ticket."""
        yield ticket.sample
        substitutes = numpy_at(Purpose.REPLACEMENT, self.recipe.seed, ticket.epoch, ticket.sample)
        found: list[int] = substitutes.integers(len(self.index), size=_SUBSTITUTES).tolist()
        yield from (sample for sample in found if sample != ticket.sample)

    def _fault(self, ticket: Ticket, error: UnusableError) -> Fault:
        """A fault with the sample's name, for which a shard that is out of reach is not asked again."""
        row = self.index.samples[ticket.sample]
        shard = self.index.shards[row["shard"]].name
        in_reach = error.reason not in OUT_OF_REACH
        name = self.index.name_of(ticket.sample) if in_reach else f"{shard}: offset {row['offset']}"
        return Fault(ticket.epoch, ticket.sample, error.reason, str(error), shard, name)

    def _announce(self, stretch: Stretch) -> None:
        first, last = self.index.samples[stretch.first], self.index.samples[stretch.last - 1]
        start = int(first["offset"])
        shard = self.index.shards[first["shard"]].name
        with suppress(OSError):  # it is a hint; the read itself will say what is wrong
            self.index.store.will_need(shard, start, int(last["offset"]) + int(last["size"]) - start)


def _empty_batch(count: int, size: int) -> Tensor:
    """uint8 [count, 3, size, size], channels last; in a worker in shared memory, where the main process finds it."""
    shape = (count, size, size, 3)
    if get_worker_info() is None:
        flat = torch.empty(shape, dtype=torch.uint8)
    else:
        storage = torch.UntypedStorage._new_shared(count * size * size * 3, device="cpu")
        flat = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    return flat.permute(0, 3, 1, 2)


def _begin_worker(worker: int) -> None:
    leave_signals_to_the_main_process()


class _Requests:
    """Endless micro-batches of one rank, as shares of its streams."""

    def __init__(self, order: Order, first_batch: int, recipe: Recipe, ranks: Ranks) -> None:
        self.order, self.first_batch, self.micro_batch = order, first_batch, recipe.train.micro_batch
        self.streams = recipe.streams_of(ranks.rank, ranks.world_size)

    def __iter__(self) -> Iterator[Share]:
        batch = self.first_batch
        while True:
            tickets, ahead = self.order.share(batch, self.streams)
            for first in range(0, len(tickets), self.micro_batch):
                yield Share(tickets[first : first + self.micro_batch], ahead if first == 0 else [])
            batch += 1


class Stream:
    """Endless micro-batches of this rank from a position on. Close it, or use it as a context.

    Args:
        record: JSON lines file that names samples which could not be used.
    """

    def __init__(
        self, recipe: Recipe, ranks: Ranks, index: ShardIndex, position: Position, record: Path | None = None
    ) -> None:
        self.index = index
        self.rank = ranks.rank
        self.allowed = recipe.data.max_corrupt_fraction * len(index)
        self.tally = Tally(record)
        self.retried = 0
        self.bytes_read = 0
        self.cache_use = CacheUse()
        workers = recipe.data.num_workers
        first_batch = position.samples // recipe.train.global_batch
        loader: DataLoader[Batch] = DataLoader(
            Views(index, recipe),
            batch_sampler=_Requests(order_of(recipe, index), first_batch, recipe, ranks),  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=recipe.data.prefetch_factor if workers else None,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_begin_worker,
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
            if (lost := lost_worker(self._told_by_torch(error), self.rank)) is not None:
                raise lost from error
            raise
        if batch.refusal is not None:
            raise UsageError(batch.refusal)
        self.retried += batch.retried
        self.bytes_read += batch.bytes_read
        self.cache_use = self.cache_use.plus(batch.cache_use)
        for fault in batch.faults:
            self.tally.add(fault)
            if (found := self.tally.of_epoch(fault.epoch)).total() > self.allowed:
                raise too_many(found, self.tally.counts, fault.epoch, self.allowed)
        if -1 in batch.samples:
            raise TooManyFaultsError(
                f"rank {self.rank}: nothing that could have replaced an unusable sample is usable either "
                f"({describe(self.tally.counts)}); see 'mixmae shards check {self.index.store.location}'"
            )
        return batch

    def _told_by_torch(self, error: BaseException) -> BaseException:
        """Torch's own error where the pipe of a worker that died broke before torch was told of its death."""
        workers = getattr(self._batches, "_workers", [])
        if isinstance(error, RuntimeError) or not workers:
            return error
        try:
            connection.wait([worker.sentinel for worker in workers], _NOTICE)
            time.sleep(0)  # torch's signal handler runs between two steps of the interpreter
        except RuntimeError as told:
            return told
        dead = [worker.pid for worker in workers if not worker.is_alive()]
        return RuntimeError(f"DataLoader worker (pid {dead[0]}) broke off its connection") if dead else error

    @property
    def ready(self) -> int:
        """Micro-batches that workers have finished and nobody has taken."""
        finished = getattr(self._batches, "_worker_result_queue", None)  # torch tells it nowhere else
        return finished.qsize() if finished is not None else 0

    def close(self) -> None:
        """Ends the workers; lets go of files and shared memory."""
        end = getattr(self._batches, "_shutdown_workers", None)
        if end is not None:  # an exception's traceback may hold the iterator, which ends them only when it goes
            try:
                end()
            except RuntimeError as error:
                if lost_worker(error, self.rank) is None:
                    raise
                end()  # torch told of a worker's death while it was waiting for the others
        self._batches = None
        self.index.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def order_of(recipe: Recipe, index: ShardIndex) -> Order:
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
    return Order(recipe.seed, counts, recipe.streams, recipe.train.global_batch, data.shuffle_window, data.drop_last)


def lost_worker(error: BaseException, rank: int) -> LostWorkerError | None:
    """What to say of an error that is torch's for a worker that died, which it raises wherever the main thread is."""
    found = _LOST.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    return LostWorkerError(
        f"rank {rank}: data worker process {found[1]} ended ({str(error).splitlines()[0]}); if the machine ran out of "
        "memory, lower data.num_workers or data.prefetch_factor; the run resumes from its newest checkpoint"
    )


def _as_it_is(batch: Any) -> Any:
    return batch
