"""Held-out images, split evenly among the ranks so that all run the same number of batches."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.image_size import ImageSize, both_sides
from mixmae.trainer.data.decode import center_resized_crop
from mixmae.trainer.data.faults import UnusableError, first_names, is_usable
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.pixels import RGB, PixelFormat

_View = tuple[Tensor, Tensor | None]


def evaluation_crop(recipe: Recipe) -> float:
    """Side of the crop that classifiers are judged on, over the image's shorter side.

    As the papers do: 224 px of 256 up to 224 px, all of it above; of a rectangle the longer side says.
    """
    given = recipe.evaluate.crop_ratio
    return given if given is not None else 0.875 if max(both_sides(recipe.encoder.img_size)) <= 224 else 1.0


def require_readable(index: ShardIndex, purpose: str) -> None:
    """Raises UsageError where an index says that images cannot be used: no figure would be of the whole set."""
    unusable = np.flatnonzero(~is_usable(index.samples["state"]))
    if len(unusable):
        names = first_names([index.name_of(int(sample)) for sample in unusable[:3]], count=len(unusable))
        raise UsageError(
            f"{purpose} reads every image, but {len(unusable)} of {len(index)} in {index.store.location} cannot be "
            f"used: {names}; build the shards without them ('mixmae shards check' says why)"
        )


class HeldOut(NamedTuple):
    """A batch of held-out images."""

    images: Tensor
    """Centre crops, uint8 [batch, 3, H, W], or of other pixels."""
    samples: Sequence[int]
    """Index numbers of the first images, which count; those behind them fill up the batch, and were shown before."""
    valid: Tensor | None = None
    """bool [batch, H, W]: which pixels hold something; None: all do."""


def held_out_batches(
    index: ShardIndex,
    size: ImageSize,
    batch: int,
    ranks: Ranks,
    crop_ratio: float = 1.0,
    threads: int = 1,
    beat: Callable[[], None] = lambda: None,
    pixels: PixelFormat = RGB,
) -> Iterator[HeldOut]:
    """This rank's batches. Every image counts once, on one rank: rank r of W has images r, r + W, ... in this order.

    Args:
        crop_ratio: side of the crop over the image's shorter side.
        threads: that decode; one batch is decoded ahead.
        beat: called with each batch, to show that the rank makes progress.
        pixels: that images have to have.

    Raises:
        UsageError: an image cannot be read.
    """
    own = range(ranks.rank, len(index), ranks.world_size)
    batches = -(-len(range(0, len(index), ranks.world_size)) // batch)
    ahead: deque[tuple[list[Future[_View]], Sequence[int]]] = deque()
    with ThreadPoolExecutor(max(1, threads), "decode") as pool:
        for first in range(0, batches * batch, batch):
            counted = own[first : first + batch]
            filling = [own[i % len(own)] if len(own) else 0 for i in range(batch - len(counted))]
            # Read here, one after the other: a store belongs to one thread.
            read = ((sample, _read(index, sample)) for sample in (*counted, *filling))
            ahead.append(([pool.submit(_view, index, *image, size, crop_ratio, pixels) for image in read], counted))
            if len(ahead) > 1:
                beat()
                yield _collected(*ahead.popleft())
        while ahead:
            beat()
            yield _collected(*ahead.popleft())


def _collected(views: list[Future[_View]], counted: Sequence[int]) -> HeldOut:
    images, valid = zip(*(view.result() for view in views), strict=True)
    return HeldOut(torch.stack(images), counted, None if valid[0] is None else torch.stack(valid))


def _read(index: ShardIndex, sample: int) -> bytes:
    try:
        return index.read(sample)
    except UnusableError as error:
        raise index.refusal(sample, error) from error


def _view(
    index: ShardIndex, sample: int, content: bytes, size: ImageSize, crop_ratio: float, pixels: PixelFormat
) -> _View:
    """An image, and which of its pixels hold something, where the format says that some may not."""
    valid = None if pixels.nodata is None else torch.empty(both_sides(size), dtype=torch.bool)
    state = int(index.samples[sample]["state"])
    try:
        return center_resized_crop(content, state, size, crop_ratio, pixels, valid), valid
    except UnusableError as error:
        raise index.refusal(sample, error) from error


def gather_rows(own: Tensor, total: int, ranks: Ranks) -> Tensor:
    """What ranks computed of their images of `held_out_batches`, for all images in their order, on every rank.

    Args:
        own: [n, ...], a row for each image that counts on this rank.
        total: images of all ranks.
    """
    if ranks.world_size == 1:
        return own
    most = -(-total // ranks.world_size)
    padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(ranks.world_size)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]
