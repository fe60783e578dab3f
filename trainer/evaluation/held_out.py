"""Images of held-out shards, dealt to the ranks in equal numbers of batches, so that all compute together."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.trainer.data.decode import center_resized_crop
from mixmae.trainer.data.faults import UnusableError
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe


def evaluation_crop(recipe: Recipe) -> float:
    """Side of the crop that classifiers are judged on, over the image's shorter side.

    As the papers do: 224 px of 256 up to 224 px, all of it above.
    """
    given = recipe.evaluate.crop_ratio
    return given if given is not None else 0.875 if recipe.encoder.img_size <= 224 else 1.0


class HeldOut(NamedTuple):
    """A batch of held-out images."""

    images: Tensor
    """Centre crops, uint8 [batch, 3, size, size]."""
    samples: Sequence[int]
    """Index numbers of the first images, which count; those behind them fill up the batch, and were shown before."""


def held_out_batches(
    index: ShardIndex, size: int, batch: int, ranks: Ranks, crop_ratio: float = 1.0
) -> Iterator[HeldOut]:
    """This rank's batches. Every image counts once, on one rank.

    Args:
        crop_ratio: side of the crop over the image's shorter side.

    Raises:
        UsageError: an image cannot be read.
    """
    own = range(ranks.rank, len(index), ranks.world_size)
    batches = -(-len(range(0, len(index), ranks.world_size)) // batch)
    for first in range(0, batches * batch, batch):
        counted = own[first : first + batch]
        filling = [own[i % len(own)] if len(own) else 0 for i in range(batch - len(counted))]
        views = [_view(index, sample, size, crop_ratio) for sample in (*counted, *filling)]
        yield HeldOut(torch.stack(views), counted)


def _view(index: ShardIndex, sample: int, size: int, crop_ratio: float) -> Tensor:
    try:
        return center_resized_crop(index.read(sample), int(index.samples[sample]["state"]), size, crop_ratio)
    except UnusableError as error:
        raise UsageError(f"{index.name_of(sample)} cannot be used: {error.reason.label}, {error}") from error
