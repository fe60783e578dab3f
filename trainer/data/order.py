"""The sample order of a run as arithmetic, so that any position in it is computed and never replayed.

An epoch's shards are shuffled and concatenated. The sequence is split into a fixed number of *streams*, as equal as
whole samples allow, and every global batch takes the next few samples of each stream. Within a stream samples are
shuffled in windows. A rank serves whole streams, so that neither the number of ranks nor that of workers changes a
global batch.

Where shards lie in several places, those of each are shuffled and concatenated for themselves, and an epoch's sequence
takes a quota of every place, in blocks of a window's length that have each place's share. The next epoch goes on in a
place where the one before ended; a place that is gone through begins again, in another order.

Stream c of C has, when epoch e begins, served floor((e N + c) / C) samples, N being those of an epoch. Over all streams
that sums to e N (Hermite's identity): an epoch's last global batch is completed by the first samples of the next epoch,
always with the same number from each stream.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mixmae.trainer.data.rng import Purpose, numpy_at

Numbers = npt.NDArray[np.int64]


class SampleRef(NamedTuple):
    """One sample in one epoch."""

    epoch: int
    sample: int
    visit: int
    """How many times the sample's place had been gone through before; the epoch, unless places have weights."""


class Quota(NamedTuple):
    """A place's part of every epoch."""

    shards: int
    """Number of its shards; they follow those of the place before."""
    samples: int
    """Samples that an epoch takes of it."""


class SampleRange(NamedTuple):
    """Consecutive samples of one shard: numbers `first` up to, not including, `last`."""

    first: int
    last: int


class BatchSlice(NamedTuple):
    """What some streams contribute to a global batch, and the ranges to prefetch from now on."""

    samples: list[SampleRef]
    prefetch: list[SampleRange]


class _Visit(NamedTuple):
    """The sequence of a place's shards, one time that it is gone through."""

    shards: Numbers
    shard_starts: Numbers
    """Position in the sequence at which each shard begins; one more than shards."""


class Order:
    """The order of a run.

    Args:
        seed: of the run.
        counts: samples of each shard.
        streams: number of streams; divides global_batch.
        global_batch: samples of a step.
        shuffle_window: samples of a stream that are shuffled among each other.
        drop_last: leave out, in every epoch, the samples that do not fill a global batch.
        quotas: of places, together as many samples as there are; None: one place.
    """

    def __init__(
        self,
        seed: int,
        counts: Sequence[int],
        streams: int,
        global_batch: int,
        shuffle_window: int,
        drop_last: bool = False,
        quotas: Sequence[Quota] | None = None,
    ) -> None:
        assert global_batch % streams == 0, (global_batch, streams)
        self.seed, self.streams, self.shuffle_window = seed, streams, shuffle_window
        self.counts = np.asarray(counts, dtype=np.int64)
        self.first_samples = np.concatenate([[0], np.cumsum(self.counts)])
        self.num_samples = int(self.counts.sum())
        self.quotas = tuple(quotas or [Quota(len(counts), self.num_samples)])
        self._first_shards = np.cumsum([0, *(quota.shards for quota in self.quotas)])
        self._per_epoch = np.array([quota.samples for quota in self.quotas], dtype=np.int64)
        assert self._first_shards[-1] == len(counts), "a quota for every shard"
        assert self._per_epoch.sum() == self.num_samples, "an epoch of as many samples as there are"
        self._blocks = -(-self.num_samples // shuffle_window) if len(self.quotas) > 1 else 1
        """In which places take turns."""
        self._block_starts = self._taken(np.arange(self._blocks + 1)).sum(axis=1)
        self.per_batch = global_batch // streams
        self.kept_per_stream = self.num_samples // global_batch * self.per_batch if drop_last else None
        """Samples of each stream in an epoch that drops its last ones."""
        assert self.kept_per_stream != 0, "no epoch without a global batch"
        self._stream_starts = lru_cache(maxsize=2)(self._compute_stream_starts)  # streams enter an epoch one by one
        self._visit = lru_cache(maxsize=64)(self._compute_visit)
        self._open_windows: dict[int, tuple[tuple[int, int], Numbers, Numbers]] = {}

    def slice_of(self, batch: int, streams: range) -> BatchSlice:
        """What the streams contribute to global batch number `batch`, stream by stream."""
        samples: list[SampleRef] = []
        prefetch: list[SampleRange] = []
        for stream in streams:
            for served in range(batch * self.per_batch, (batch + 1) * self.per_batch):
                epoch, offset = self._epoch_at(stream, served)
                window, inside = self._window_at(stream, offset)
                if self._open_windows.get(stream, (None,))[0] != (epoch, window):
                    self._open_windows[stream] = (epoch, window), *self._shuffled_window(epoch, stream, window)
                    prefetch += self._ranges_of_window(stream)
                _, numbers, visits = self._open_windows[stream]
                samples.append(SampleRef(epoch, int(numbers[inside]), int(visits[inside])))
        return BatchSlice(samples, prefetch)

    def _window_at(self, stream: int, offset: int) -> tuple[int, int]:
        """The window of a stream's sample number `offset` of an epoch, and its number within that window."""
        window, inside = divmod(offset + self._stagger(stream), self.shuffle_window)
        return window, inside if window else offset

    def _stagger(self, stream: int) -> int:
        """Streams open their windows in turn, so that each step reads about as many bytes."""
        return stream * self.shuffle_window // self.streams

    def _epoch_at(self, stream: int, served: int) -> tuple[int, int]:
        """The epoch of a stream's sample number `served`, and its number within that epoch."""
        if self.kept_per_stream is not None:
            return divmod(served, self.kept_per_stream)
        epoch = ((served + 1) * self.streams - 1 - stream) // self.num_samples
        return epoch, served - (epoch * self.num_samples + stream) // self.streams

    def _compute_stream_starts(self, epoch: int) -> Numbers:
        """Position in an epoch's sequence at which each stream begins; one more than streams."""
        served = (np.array([[epoch], [epoch + 1]]) * self.num_samples + np.arange(self.streams)) // self.streams
        return np.concatenate([[0], np.cumsum(served[1] - served[0])])

    def _compute_visit(self, place: int, number: int) -> _Visit:
        first, end = self._first_shards[place : place + 2]
        key = (number, place) if place else (number,)
        shards = first + numpy_at(Purpose.ORDER, self.seed, *key).permutation(end - first)
        return _Visit(shards, np.concatenate([[0], np.cumsum(self.counts[shards])]))

    def _taken(self, blocks: Numbers) -> Numbers:
        """Samples that so many blocks take of each place; [blocks, places]."""
        return blocks[:, None] * self._per_epoch // self._blocks

    def _bounds_of_window(self, epoch: int, stream: int, window: int) -> tuple[int, int]:
        """Positions in the epoch's sequence at which a window begins and ends."""
        starts = self._stream_starts(epoch)
        start = int(starts[stream]) - self._stagger(stream) + window * self.shuffle_window
        return max(start, int(starts[stream])), min(start + self.shuffle_window, int(starts[stream + 1]))

    def _shuffled_window(self, epoch: int, stream: int, window: int) -> tuple[Numbers, Numbers]:
        """The samples of a window in the order in which they are served, and their visits."""
        positions = np.arange(*self._bounds_of_window(epoch, stream, window))
        shuffled = numpy_at(Purpose.WINDOW, self.seed, epoch, stream, window).permutation(positions)
        return self._samples_at(epoch, shuffled)

    def _samples_at(self, epoch: int, positions: Numbers) -> tuple[Numbers, Numbers]:
        """The samples at positions of an epoch's sequence, and their visits."""
        if len(self.quotas) == 1:
            return self._samples_of_visit(0, epoch, positions), np.full_like(positions, epoch)
        places, taken = self._places_at(positions)
        sizes = self.first_samples[self._first_shards[places + 1]] - self.first_samples[self._first_shards[places]]
        visits, offsets = np.divmod(epoch * self._per_epoch[places] + taken, sizes)
        samples = np.empty_like(positions)
        for place in np.unique(places):
            for number in np.unique(visits[places == place]):
                here = (places == place) & (visits == number)
                samples[here] = self._samples_of_visit(int(place), int(number), offsets[here])
        return samples, visits

    def _places_at(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """The place of each position, and how many samples of it the epoch has taken before."""
        block = np.searchsorted(self._block_starts, positions, side="right") - 1
        before = self._taken(block)
        ends = np.cumsum(self._taken(block + 1) - before, axis=1)
        inside = positions - self._block_starts[block]
        places = (ends <= inside[:, None]).sum(axis=1)
        rows = np.arange(len(positions))
        begins = np.where(places > 0, ends[rows, places - 1], 0)
        return places, before[rows, places] + inside - begins

    def _samples_of_visit(self, place: int, number: int, offsets: Numbers) -> Numbers:
        visit = self._visit(place, number)
        which = np.searchsorted(visit.shard_starts, offsets, side="right") - 1
        return self.first_samples[visit.shards[which]] + offsets - visit.shard_starts[which]

    def _ranges_of_window(self, stream: int) -> list[SampleRange]:
        """The ranges of shards that make up a stream's open window."""
        samples = np.unique(self._open_windows[stream][1])
        shards = np.searchsorted(self.first_samples, samples, side="right")
        breaks = np.flatnonzero((np.diff(samples) != 1) | (np.diff(shards) != 0)) + 1
        return [SampleRange(int(part[0]), int(part[-1]) + 1) for part in np.split(samples, breaks)]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts as the weights say, each exact to less than one (by largest remainders)."""
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    parts = [math.floor(part) for part in exact]
    largest = sorted(range(len(parts)), key=lambda number: (parts[number] - exact[number], number))
    for number in largest[: total - sum(parts)]:
        parts[number] += 1
    return parts
