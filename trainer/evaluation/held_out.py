"""Held-out images, split evenly among the ranks so that all run the same number of batches."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.trainer.data.decode import center_resized_crop
from mixmae.trainer.data.faults import UnusableError
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.engine.distributed import Ranks


def held_out_batches(index: ShardIndex, size: int, batch: int, ranks: Ranks) -> Iterator[tuple[Tensor, int]]:
    """This rank's batches, and how many of a batch's images count.

    Centre crops, uint8 [batch, 3, size, size]. Every image counts once, on one rank; what fills up the last batches is
    shown a second time and does not count.

    Raises:
        UsageError: an image cannot be read.
    """
    own = range(ranks.rank, len(index), ranks.world_size)
    batches = -(-len(range(0, len(index), ranks.world_size)) // batch)
    for first in range(0, batches * batch, batch):
        counted = own[first : first + batch]
        filling = [own[i % len(own)] if len(own) else 0 for i in range(batch - len(counted))]
        yield torch.stack([_view(index, sample, size) for sample in (*counted, *filling)]), len(counted)


def _view(index: ShardIndex, sample: int, size: int) -> Tensor:
    try:
        return center_resized_crop(index.read(sample), int(index.samples[sample]["state"]), size)
    except UnusableError as error:
        raise UsageError(f"{index.name_of(sample)} cannot be used: {error.reason.label}, {error}") from error
