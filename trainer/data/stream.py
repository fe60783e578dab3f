"""The sequence of batches: which sample comes when, and workers that turn samples into uint8 batches.

The order is the epochs' permutations one behind the other; a global batch is the next `global_batch` of it. It is a
function of (seed, index) alone, so a position in the run is one number, the samples seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.config import Recipe
from trainer.data.decode import Pixels, UnreadableImageError, training_view
from trainer.data.index import ShardIndex
from trainer.distributed import Ranks
from trainer.errors import UsageError
from trainer.rng import Purpose, numpy_at


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
                f"the shards in {index.directory} changed since the run was started (fingerprint "
                f"{index.fingerprint[:12]}, then {self.fingerprint[:12]}); restore them or start another "
                "run_dir"
            )


class Ticket(NamedTuple):
    """One sample of one epoch."""

    epoch: int
    sample: int


class Batch(NamedTuple):
    """A micro-batch: images uint8 [B, 3, H, W] and the samples they show."""

    images: Tensor
    samples: list[int]


class ToDevice:
    """uint8 [B, 3, H, W] on the host to normalised fp32 on the device, without blocking the host."""

    def __init__(self, device: torch.device, mean: Sequence[float], std: Sequence[float]) -> None:
        self.device = device
        self.mean = torch.tensor(mean, device=device)[:, None, None] * 255
        self.inverse_std = 1 / (torch.tensor(std, device=device)[:, None, None] * 255)

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self.device, non_blocking=True) - self.mean) * self.inverse_std


class Order:
    """Which samples make up a stretch of the run."""

    def __init__(self, seed: int, num_samples: int) -> None:
        self.num_samples = num_samples
        # Two epochs: a stretch may cross from one into the next.
        self._permutation = lru_cache(maxsize=2)(lambda epoch: _permutation(seed, epoch, num_samples))

    def tickets(self, start: int, count: int) -> list[Ticket]:
        """The samples number `start` to `start + count` of the run."""
        return [
            Ticket(epoch, int(self._permutation(epoch)[place]))
            for epoch, place in (divmod(number, self.num_samples) for number in range(start, start + count))
        ]


def _permutation(seed: int, epoch: int, num_samples: int) -> npt.NDArray[np.int64]:
    return numpy_at(Purpose.ORDER, seed, epoch).permutation(num_samples)


class Views(Dataset[tuple[Pixels | str, int]]):
    """Ticket to augmented view."""

    def __init__(self, index: ShardIndex, recipe: Recipe) -> None:
        self.index = index
        self.recipe = recipe

    def __getitem__(self, ticket: Ticket) -> tuple[Pixels | str, int]:
        """The view and its sample, or what is wrong with it and the sample."""
        random = numpy_at(Purpose.VIEW, self.recipe.seed, ticket.epoch, ticket.sample)
        try:
            content = self.index.read(self.index.samples[ticket.sample])
            view = training_view(content, self.recipe.model.img_size, self.recipe.data, random)
        except (UnreadableImageError, OSError) as error:
            return str(error), ticket.sample
        return view, ticket.sample


class _Batches:
    """Endless micro-batches of one rank, as lists of tickets."""

    def __init__(self, order: Order, start: int, recipe: Recipe, ranks: Ranks) -> None:
        self.order, self.start, self.recipe, self.ranks = order, start, recipe, ranks

    def __iter__(self) -> Iterator[list[Ticket]]:
        global_batch, micro_batch = self.recipe.train.global_batch, self.recipe.train.micro_batch
        share = global_batch // self.ranks.world_size
        start = self.start + self.ranks.rank * share
        while True:
            tickets = self.order.tickets(start, share)
            for first in range(0, share, micro_batch):
                yield tickets[first : first + micro_batch]
            start += global_batch


def stream(recipe: Recipe, ranks: Ranks, index: ShardIndex, position: Position) -> Iterator[Batch]:
    """Endless micro-batches of this rank from `position` on, in pinned memory where there is a GPU.

    Raises:
        UsageError: an image cannot be read; its name is in the message.
    """
    workers = recipe.data.num_workers
    loader: DataLoader[Any] = DataLoader(
        Views(index, recipe),
        batch_sampler=_Batches(Order(recipe.seed, len(index)), position.samples, recipe, ranks),
        num_workers=workers,
        prefetch_factor=recipe.data.prefetch_factor if workers else None,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
    for images, samples, fault in loader:
        if fault is not None:
            raise UsageError(
                f"{index.name_of(fault[1])} in {index.directory} cannot be read: {fault[0]}; repair or "
                "remove it and rebuild the shards"
            )
        yield Batch(images, samples)


def _collate(views: list[tuple[Any, int]]) -> tuple[Tensor, list[int], tuple[str, int] | None]:
    """Images, samples and the first fault among them, if any."""
    for view, sample in views:
        if isinstance(view, str):
            return torch.empty(0), [], (view, sample)
    return torch.from_numpy(np.stack([view for view, _ in views])), [sample for _, sample in views], None
