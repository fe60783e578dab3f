"""The sample order of a run as arithmetic, so that any position in it is computed and never replayed.

An epoch's shards are shuffled and concatenated. The sequence is split into a fixed number of *streams*, as equal as
whole samples allow, and every global batch takes the next few samples of each stream. Within a stream samples are
shuffled in windows. A rank serves whole streams, so that neither the number of ranks nor that of workers changes a
global batch.

Stream c of C has, when epoch e begins, served floor((e N + c) / C) samples, N being those of an epoch. Over all streams
that sums to e N (Hermite's identity): an epoch's last global batch is completed by the first samples of the next epoch,
always with the same number from each stream.
"""

from collections.abc import Sequence
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


class SampleRange(NamedTuple):
    """Consecutive samples of one shard: numbers `first` up to, not including, `last`."""

    first: int
    last: int


class BatchSlice(NamedTuple):
    """What some streams contribute to a global batch, and the ranges to prefetch from now on."""

    samples: list[SampleRef]
    prefetch: list[SampleRange]


class _EpochLayout(NamedTuple):
    """An epoch's sequence of shards, and where its streams begin."""

    shards: Numbers
    shard_starts: Numbers
    """Position in the sequence at which each shard begins; one more than shards."""
    stream_starts: Numbers
    """Position in the sequence at which each stream begins; one more than streams."""


class Order:
    """The order of a run.

    Args:
        seed: of the run.
        counts: samples of each shard.
        streams: number of streams; divides global_batch.
        global_batch: samples of a step.
        shuffle_window: samples of a stream that are shuffled among each other.
        drop_last: leave out, in every epoch, the samples that do not fill a global batch.
    """

    def __init__(
        self,
        seed: int,
        counts: Sequence[int],
        streams: int,
        global_batch: int,
        shuffle_window: int,
        drop_last: bool = False,
    ) -> None:
        assert global_batch % streams == 0, (global_batch, streams)
        self.seed, self.streams, self.shuffle_window = seed, streams, shuffle_window
        self.counts = np.asarray(counts, dtype=np.int64)
        self.first_samples = np.concatenate([[0], np.cumsum(self.counts)])
        self.num_samples = int(self.counts.sum())
        self.per_batch = global_batch // streams
        self.kept_per_stream = self.num_samples // global_batch * self.per_batch if drop_last else None
        """Samples of each stream in an epoch that drops its last ones."""
        assert self.kept_per_stream != 0, "no epoch without a global batch"
        self._layout = lru_cache(maxsize=2)(self._compute_layout)  # two: streams enter an epoch one after the other
        self._open_windows: dict[int, tuple[tuple[int, int], Numbers]] = {}

    def slice_of(self, batch: int, streams: range) -> BatchSlice:
        """What the streams contribute to global batch number `batch`, stream by stream."""
        samples: list[SampleRef] = []
        prefetch: list[SampleRange] = []
        for stream in streams:
            for served in range(batch * self.per_batch, (batch + 1) * self.per_batch):
                epoch, offset = self._epoch_at(stream, served)
                window, inside = self._window_at(stream, offset)
                if self._open_windows.get(stream, (None,))[0] != (epoch, window):
                    self._open_windows[stream] = (epoch, window), self._shuffled_window(epoch, stream, window)
                    prefetch += self._ranges_of_window(stream)
                samples.append(SampleRef(epoch, int(self._open_windows[stream][1][inside])))
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

    def _compute_layout(self, epoch: int) -> _EpochLayout:
        shards = numpy_at(Purpose.ORDER, self.seed, epoch).permutation(len(self.counts))
        shard_starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
        served = (np.array([[epoch], [epoch + 1]]) * self.num_samples + np.arange(self.streams)) // self.streams
        return _EpochLayout(shards, shard_starts, np.concatenate([[0], np.cumsum(served[1] - served[0])]))

    def _bounds_of_window(self, epoch: int, stream: int, window: int) -> tuple[int, int]:
        """Positions in the epoch's sequence at which a window begins and ends."""
        starts = self._layout(epoch).stream_starts
        start = int(starts[stream]) - self._stagger(stream) + window * self.shuffle_window
        return max(start, int(starts[stream])), min(start + self.shuffle_window, int(starts[stream + 1]))

    def _shuffled_window(self, epoch: int, stream: int, window: int) -> Numbers:
        """The samples of a window in the order in which they are served."""
        layout = self._layout(epoch)
        positions = np.arange(*self._bounds_of_window(epoch, stream, window))
        which = np.searchsorted(layout.shard_starts, positions, side="right") - 1
        samples = self.first_samples[layout.shards[which]] + positions - layout.shard_starts[which]
        return numpy_at(Purpose.WINDOW, self.seed, epoch, stream, window).permutation(samples)

    def _ranges_of_window(self, stream: int) -> list[SampleRange]:
        """The ranges of shards that make up a stream's open window."""
        samples = np.sort(self._open_windows[stream][1])
        shards = np.searchsorted(self.first_samples, samples, side="right")
        breaks = np.flatnonzero((np.diff(samples) != 1) | (np.diff(shards) != 0)) + 1
        return [SampleRange(int(part[0]), int(part[-1]) + 1) for part in np.split(samples, breaks)]
