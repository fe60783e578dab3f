"""An exponential moving average of a run's weights: of the fp32 masters, each rank averaging its own share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mixmae.trainer.checkpoints.files import ReadItem
from mixmae.trainer.checkpoints.slices import EMA, ModelSlices, own_share


class Ema:
    """The average of an engine's trained weights, from what they are now on.

    In bf16, small updates would vanish: the average is of the fp32 masters, at every ZeRO stage.

    Args:
        decay: of the average in an update; less in the first ones, (1 + n) / (10 + n) in the n-th, so that a short run
            does not average what it started from.
    """

    def __init__(self, slices: ModelSlices, decay: float) -> None:
        self._slices, self._decay = slices, decay
        self._held = [held for held in slices.held if not held.frozen]
        self._weights = [held.of(held.source) for held in self._held]
        self._averages = [weights.clone() for weights in self._weights]

    def restart(self) -> None:
        """Averages from the present weights on."""
        for average, weights in zip(self._averages, self._weights, strict=True):
            average.copy_(weights)

    def update(self, count: int) -> None:
        """Takes the weights into the average; `count` is of the optimizer's steps so far. Nothing waits."""
        decay = min(self._decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average for its weights, then its own again, bit for bit. All ranks call it together."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        self._slices.begin_load((), {})
        for weights, average in zip(self._weights, self._averages, strict=True):
            own = weights.clone()
            weights.copy_(average)
            average.copy_(own)
        self._slices.end_load()

    def to_write(self) -> dict[str, Tensor]:
        """What this rank saves, by its name in the file."""
        tensors = {}
        for held, average in zip(self._held, self._averages, strict=True):
            share = own_share(held) if held.replicated else held
            if share.numel > 0:
                start = share.start - held.start
                tensors[f"{EMA}/{share.name}@{share.start}"] = average[start : start + share.numel]
        return tensors

    def to_read(self) -> list[ReadItem]:
        """The parts of a checkpoint that this rank has."""
        parts = zip(self._held, self._averages, strict=True)
        return [ReadItem(EMA, held.name, held.start, average) for held, average in parts]
