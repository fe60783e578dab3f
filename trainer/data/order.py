"""Which sample comes when: the order of a run as arithmetic, so that any place in it is computed and not replayed.

An epoch's shards are shuffled and laid end to end. The line is cut into a fixed number of *streams*, as equal as whole
samples allow, and every global batch takes the next few samples of each stream. Within a stream samples are shuffled in
windows. A rank serves whole streams, so that neither the number of ranks nor that of workers changes a global batch.

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


class Ticket(NamedTuple):
    """One sample of one epoch."""

    epoch: int
    sample: int


class Stretch(NamedTuple):
    """Samples that lie one behind the other in one shard: numbers `first` up to, not including, `last`."""

    first: int
    last: int


class Share(NamedTuple):
    """What some streams give to a global batch, and the stretches that are read from here on."""

    tickets: list[Ticket]
    ahead: list[Stretch]


class _Epoch(NamedTuple):
    """An epoch's line of shards, and where its streams are cut."""

    shards: Numbers
    starts: Numbers
    """Where each shard begins on the line; one more than shards."""
    cuts: Numbers
    """Where each stream begins on the line; one more than streams."""


class Order:
    """The order of a run.

    Args:
        seed: of the run.
        counts: samples of each shard.
        streams: number of streams; divides global_batch.
        global_batch: samples of a step.
        window: samples of a stream that are shuffled among each other.
        drop_last: leave out, in every epoch, the samples that do not fill a global batch.
    """

    def __init__(
        self, seed: int, counts: Sequence[int], streams: int, global_batch: int, window: int, drop_last: bool = False
    ) -> None:
        assert global_batch % streams == 0, (global_batch, streams)
        self.seed, self.streams, self.window = seed, streams, window
        self.counts = np.asarray(counts, dtype=np.int64)
        self.first_samples = np.concatenate([[0], np.cumsum(self.counts)])
        self.num_samples = int(self.counts.sum())
        self.per_batch = global_batch // streams
        self.kept = self.num_samples // global_batch * self.per_batch if drop_last else None
        """Samples of each stream in an epoch that drops its last ones."""
        assert self.kept != 0, "no epoch without a global batch"
        self._epoch = lru_cache(maxsize=2)(self._lay_out)  # two: streams enter an epoch one after the other
        self._open: dict[int, tuple[tuple[int, int], Numbers]] = {}

    def share(self, batch: int, streams: range) -> Share:
        """What the streams give to global batch number `batch`, stream by stream."""
        tickets: list[Ticket] = []
        ahead: list[Stretch] = []
        for stream in streams:
            for place in range(batch * self.per_batch, (batch + 1) * self.per_batch):
                epoch, offset = self._epoch_at(stream, place)
                window, inside = self._window_at(stream, offset)
                if self._open.get(stream, (None,))[0] != (epoch, window):
                    self._open[stream] = (epoch, window), self._shuffled(epoch, stream, window)
                    ahead += self._stretches(stream)
                tickets.append(Ticket(epoch, int(self._open[stream][1][inside])))
        return Share(tickets, ahead)

    def _window_at(self, stream: int, offset: int) -> tuple[int, int]:
        """The window of a stream's sample number `offset` of an epoch, and its number within that window."""
        window, inside = divmod(offset + self._phase(stream), self.window)
        return window, inside if window else offset

    def _phase(self, stream: int) -> int:
        """Streams open their windows in turn: what is read in a step stays the same."""
        return stream * self.window // self.streams

    def _epoch_at(self, stream: int, place: int) -> tuple[int, int]:
        """The epoch of a stream's sample number `place`, and its number within that epoch."""
        if self.kept is not None:
            return divmod(place, self.kept)
        epoch = ((place + 1) * self.streams - 1 - stream) // self.num_samples
        return epoch, place - (epoch * self.num_samples + stream) // self.streams

    def _lay_out(self, epoch: int) -> _Epoch:
        shards = numpy_at(Purpose.ORDER, self.seed, epoch).permutation(len(self.counts))
        starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
        served = (np.array([[epoch], [epoch + 1]]) * self.num_samples + np.arange(self.streams)) // self.streams
        return _Epoch(shards, starts, np.concatenate([[0], np.cumsum(served[1] - served[0])]))

    def _span(self, epoch: int, stream: int, window: int) -> tuple[int, int]:
        """Where a window lies on the epoch's line."""
        cuts = self._epoch(epoch).cuts
        start = int(cuts[stream]) - self._phase(stream) + window * self.window
        return max(start, int(cuts[stream])), min(start + self.window, int(cuts[stream + 1]))

    def _shuffled(self, epoch: int, stream: int, window: int) -> Numbers:
        """The samples of a window in the order in which they are served."""
        line = self._epoch(epoch)
        places = np.arange(*self._span(epoch, stream, window))
        which = np.searchsorted(line.starts, places, side="right") - 1
        samples = self.first_samples[line.shards[which]] + places - line.starts[which]
        return numpy_at(Purpose.WINDOW, self.seed, epoch, stream, window).permutation(samples)

    def _stretches(self, stream: int) -> list[Stretch]:
        """The pieces of shards that make up a stream's open window."""
        samples = np.sort(self._open[stream][1])
        shards = np.searchsorted(self.first_samples, samples, side="right")
        breaks = np.flatnonzero((np.diff(samples) != 1) | (np.diff(shards) != 0)) + 1
        return [Stretch(int(piece[0]), int(piece[-1]) + 1) for piece in np.split(samples, breaks)]
