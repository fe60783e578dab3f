"""What a data worker does: reads the samples of a micro-batch, and substitutes for those that are unusable."""

from collections.abc import Iterator
from contextlib import suppress
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mixmae.base.errors import UsageError
from mixmae.trainer.data.faults import UNREACHABLE, Fault, UnusableError
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.order import BatchSlice, SampleRange, SampleRef
from mixmae.trainer.data.rng import Purpose, numpy_at, random_at
from mixmae.trainer.data.stores.store import CacheCounts
from mixmae.trainer.data.transform import BatchBuffers, SampleTransform
from mixmae.trainer.data.workers import hand_over_words

_MAX_SUBSTITUTES = 32
"""Samples tried in place of one that cannot be used."""
_MAX_OUTAGES = 3
"""Samples tried although their shards are unreachable: each may take as long as all its retries."""


class Batch(NamedTuple):
    """A micro-batch."""

    images: Tensor
    """uint8 [B, 3, H, W], or of the recipe's channels and type; channels last in memory, pinned for a GPU."""
    targets: dict[str, Tensor]
    """What the run's `SampleTransform` gives beside the images: "label", int64 [B], -1 where unlabelled; pinned too.
    Where samples have any number of a target, all of them one behind the other, and "counts", int64 [B]."""
    samples: list[int]
    """Index numbers of the samples, image by image."""
    faults: list[Fault]
    """Unusable samples that were replaced in this batch."""
    retried: int
    """Reads that were retried for it."""
    bytes_read: int
    """Of the encoded images and of their annotations."""
    cache_counts: CacheCounts = CacheCounts()
    """Hits and misses of the block cache for it."""
    usage_error: str | None = None
    """What the user has to change before anything can be read."""


class BatchReader(Dataset[Batch]):
    """Loads micro-batches; runs in the data workers."""

    def __init__(self, index: ShardIndex, transform: SampleTransform, seed: int) -> None:
        self.index, self.transform, self.seed = index, transform, seed

    def __getitems__(self, request: BatchSlice) -> Batch:
        for samples_ahead in request.prefetch:
            self._prefetch(samples_ahead)
        store = self.index.store
        retried, cache_counts = store.retried, store.cache_counts
        try:
            buffers = self.transform.new_batch(len(request.samples))
        except (RuntimeError, OSError) as error:  # of torch, where shared memory or descriptors are short
            return Batch(torch.empty(0), {}, [], [], 0, 0, usage_error=hand_over_words(error))
        samples: list[int] = []
        faults: list[Fault] = []
        try:
            for i, ref in enumerate(request.samples):
                samples.append(self._read(ref, buffers, i, faults))
            targets = buffers.collect()
        except (UsageError, MemoryError) as error:  # raised here it would reach the main process as a traceback
            why = str(error) or "a data worker ran out of memory; lower data.num_workers or data.prefetch_factor"
            return Batch(buffers.images, buffers.targets, samples, faults, 0, 0, usage_error=why)
        return Batch(
            buffers.images,
            targets,
            samples,
            faults,
            retried=store.retried - retried,
            bytes_read=self._bytes_of(samples),
            cache_counts=store.cache_counts.since(cache_counts),
        )

    def _read(self, ref: SampleRef, buffers: BatchBuffers, i: int, faults: list[Fault]) -> int:
        """Reads a sample, or the first usable one of its substitutes, into row `i`; returns which, or -1."""
        outages = 0
        for sample in self._candidates(ref):
            random = random_at(Purpose.AUGMENTATION, self.seed, ref.visit, sample)
            try:
                self._fill(sample, random, buffers, i)
            except UnusableError as error:
                if sample == ref.sample:
                    faults.append(self._fault(ref, error))
                outages += error.reason in UNREACHABLE
                if outages > _MAX_OUTAGES:
                    return -1
            else:
                return sample
        return -1

    def _fill(self, sample: int, random: Random, buffers: BatchBuffers, i: int) -> None:
        """Reads a sample into row `i`. Raises UnusableError."""
        content = self.index.read(sample) if self.transform.needs_content else b""
        row = self.index.samples[sample]
        if self.transform.reads_annotations:
            annotation = self.index.read_annotation(sample)
            self.transform.read_annotated(content, annotation, row, random, buffers, i)
        else:
            self.transform.read(content, row, random, buffers, i)

    def _bytes_of(self, samples: list[int]) -> int:
        """Bytes that were read of some samples."""
        read = int(self.index.samples["size"][samples].sum()) if self.transform.needs_content else 0
        if self.transform.reads_annotations:
            assert self.index.annotation_table is not None
            read += int(self.index.annotation_table["size"][samples].sum())
        return read

    def _candidates(self, ref: SampleRef) -> Iterator[int]:
        """The sample itself, then substitutes, which are a function of (seed, visit, sample)."""
        yield ref.sample
        generator = numpy_at(Purpose.REPLACEMENT, self.seed, ref.visit, ref.sample)
        substitutes: list[int] = generator.integers(len(self.index), size=_MAX_SUBSTITUTES).tolist()
        yield from (sample for sample in substitutes if sample != ref.sample)

    def _fault(self, ref: SampleRef, error: UnusableError) -> Fault:
        """A fault with the sample's name, for which an unreachable shard is not read again."""
        row = self.index.samples[ref.sample]
        shard = self.index.shards[row["shard"]].name
        reachable = error.reason not in UNREACHABLE
        name = self.index.name_of(ref.sample) if reachable else f"{shard}: offset {row['offset']}"
        return Fault(ref.epoch, ref.sample, error.reason, str(error), shard, name)

    def _prefetch(self, samples: SampleRange) -> None:
        first, last = self.index.samples[samples.first], self.index.samples[samples.last - 1]
        start = int(first["offset"])
        shard = self.index.shards[first["shard"]].name
        with suppress(OSError):  # only a hint; the read itself reports what is wrong
            self.index.store.will_need(shard, start, int(last["offset"]) + int(last["size"]) - start)
