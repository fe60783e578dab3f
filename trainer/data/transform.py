"""What a data worker makes of a sample: the contract `SampleTransform`, and the random crop that pretraining uses."""

from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mixmae.trainer.data.decode import random_resized_crop
from mixmae.trainer.recipe.sections.data import Data


@dataclass(frozen=True)
class BatchBuffers:
    """The tensors of one micro-batch, allocated before its samples are read."""

    images: Tensor
    """uint8 [B, 3, H, W], channels last in memory."""
    targets: dict[str, Tensor] = field(default_factory=dict)
    """Whatever else a task wants of its samples, by name; each tensor's first dimension is B."""


class SampleTransform(Protocol):
    """Turns the encoded bytes of samples into pixels and targets, inside a data worker.

    An implementation is small and picklable: it holds settings, and neither files nor generators. Its result is a
    function of the sample and of `random` alone, so that a run gives the same batches with any number of workers and
    ranks and after any resume. To implement one:

    1. `new_batch` allocates the buffers of a micro-batch with `shared_empty`, which the main process then reads
       without a copy;
    2. `read` fills row `i` of every buffer. It draws all random numbers from `random`, which the stream has seeded by
       (seed, epoch, sample). Whatever it raises as `UnusableError` makes the stream count the sample and call `read`
       again for a substitute, with the same `i`: rows are overwritten as a whole.
    """

    needs_content: ClassVar[bool] = True
    """Whether images are read at all; `read` is given no bytes where they are not."""

    def new_batch(self, count: int) -> BatchBuffers:
        """Buffers for `count` samples; their contents are undefined until `read` fills them."""

    def read(self, content: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int) -> None:
        """Decodes one sample into row `i` of the buffers.

        Args:
            content: the image file's bytes, verified against the index.
            row: the sample's row of the index (`index.SAMPLE`): `row["state"]` says how the bytes decode,
                `row["label"]` is the class, -1 where the sample is unlabelled.
            random: a generator of this sample in this epoch.

        Raises:
            UnusableError: the content cannot be decoded after all.
        """


@dataclass(frozen=True)
class RandomResizedCropFlip(SampleTransform):
    """A random crop, resized to `size` pixels and perhaps flipped, with target `label`: int64 [B], -1: unlabelled."""

    size: int
    settings: Data

    def new_batch(self, count: int) -> BatchBuffers:
        return BatchBuffers(shared_images(count, self.size), {"label": shared_empty((count,), torch.int64)})

    def read(self, content: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int) -> None:
        image, state = buffers.images[i], int(row["state"])
        random_resized_crop(content, state, self.size, self.settings, random, image)
        buffers.targets["label"][i] = int(row["label"])


def shared_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; in a data worker in shared memory, where the main process finds it without a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    elements = torch.Size(shape).numel()
    storage = torch.UntypedStorage._new_shared(elements * dtype.itemsize, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def shared_images(count: int, size: int) -> Tensor:
    """uint8 [count, 3, size, size], channels last in memory; allocated as `shared_empty` does."""
    return shared_empty((count, size, size, 3), torch.uint8).permute(0, 3, 1, 2)
