"""What a data worker makes of a sample: the contract `SampleTransform`, and the random crop that pretraining uses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mixmae.base.image_size import ImageSize, both_sides
from mixmae.trainer.data.decode import random_resized_crop
from mixmae.trainer.data.faults import Reason, UnusableError
from mixmae.trainer.recipe.sections.data import Data
from mixmae.trainer.recipe.sections.pixels import RGB, PixelFormat

VALID = "valid"
"""Target: which pixels hold something."""


@dataclass(frozen=True)
class BatchBuffers:
    """The tensors of one micro-batch, allocated before its samples are read."""

    images: Tensor
    """uint8 [B, 3, H, W], or of the recipe's channels and type; channels last in memory."""
    targets: dict[str, Tensor] = field(default_factory=dict)
    """Whatever else a task wants of its samples, by name; each tensor's first dimension is B."""
    ragged: list[dict[str, npt.NDArray[Any]] | None] = field(default_factory=list)
    """Targets of which each sample has its own number, by name, sample by sample: [n, ...]. None: not read."""

    def collect(self) -> dict[str, Tensor]:
        """All targets of the batch: ragged ones one behind the other, [sum(counts), ...], and their `counts`."""
        samples = [sample for sample in self.ragged if sample is not None]
        if not samples:
            return self.targets
        joined = {name: _joined([sample[name] for sample in samples]) for name in samples[0]}
        counts = shared_empty((len(samples),), torch.int64)
        counts.copy_(torch.tensor([len(next(iter(sample.values()))) for sample in samples]))
        return self.targets | joined | {"counts": counts}


def _joined(parts: Sequence[npt.NDArray[Any]]) -> Tensor:
    """Arrays [n, ...] one behind the other, allocated as `shared_empty` does."""
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    joined = shared_empty(shape, torch.from_numpy(parts[0]).dtype)
    np.concatenate(parts, out=joined.numpy())
    return joined


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
    reads_annotations: ClassVar[bool] = False
    """Whether `read_annotated` is called in place of `read`."""

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

    def read_annotated(
        self, content: bytes, annotation: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int
    ) -> None:
        """As `read`, of a sample with its annotation's bytes, which were verified too.

        Targets of which a sample has any number go into `buffers.ragged[i]`.
        """
        raise UnusableError(Reason.MISSING_ANNOTATION, f"{type(self).__name__} reads none")


class AnnotatedTransform(SampleTransform):
    """One that makes something of samples with their annotations."""

    reads_annotations: ClassVar[bool] = True

    def read(self, content: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int) -> None:
        raise AssertionError("samples are read with their annotations")


@dataclass(frozen=True)
class RandomResizedCropFlip(SampleTransform):
    """A random crop, resized to `size` and perhaps flipped, with target `label`: int64 [B], -1: unlabelled.

    Where some pixels hold nothing (`data.nodata`), another target, `valid`, says which do: bool [B, H, W].
    """

    size: ImageSize
    settings: Data

    def new_batch(self, count: int) -> BatchBuffers:
        targets = {"label": shared_empty((count,), torch.int64)}
        if self.settings.nodata is not None:
            targets[VALID] = shared_empty((count, *both_sides(self.size)), torch.bool)
        return BatchBuffers(shared_images(count, self.size, self.settings.pixels), targets)

    def read(self, content: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int) -> None:
        image, state = buffers.images[i], int(row["state"])
        valid = buffers.targets[VALID][i] if VALID in buffers.targets else None
        random_resized_crop(content, state, self.size, self.settings, random, image, valid)
        buffers.targets["label"][i] = int(row["label"])


def shared_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; in a data worker in shared memory, where the main process finds it without a copy."""
    if get_worker_info() is None or 0 in shape:  # there is no shared memory of no bytes
        return torch.empty(shape, dtype=dtype)
    elements = torch.Size(shape).numel()
    storage = torch.UntypedStorage._new_shared(elements * dtype.itemsize, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def shared_images(count: int, size: ImageSize, pixels: PixelFormat = RGB) -> Tensor:
    """[count, C, H, W] of a format, channels last in memory; allocated as `shared_empty` does."""
    shape = (count, *both_sides(size), pixels.channels)
    return shared_empty(shape, getattr(torch, pixels.dtype)).permute(0, 3, 1, 2)
