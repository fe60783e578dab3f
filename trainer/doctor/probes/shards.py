"""The shards as seen from a host."""

import time
from collections.abc import Iterator

import numpy as np

from mixmae.base.errors import UsageError
from mixmae.trainer.data.faults import UnusableError, is_usable
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.integrity import require_usable
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.doctor.facts import ShardFacts
from mixmae.trainer.recipe.schema import Recipe

_SHARDS = 8
"""Number of shards to read from, including the first and the last."""


def probe_shards(recipe: Recipe, seconds: float) -> ShardFacts:
    """Opens the shards as a run would, and reads samples from some of them; starts no read after `seconds`."""
    once = recipe.data.network.model_copy(update={"retries": 1})
    try:
        index = open_index(recipe.data.shards, once, recipe.data.cache)
    except UsageError as error:
        return ShardFacts(refused=str(error))
    try:
        return _read_samples(index, recipe.data.max_corrupt_fraction, seconds)
    finally:
        index.store.close()


def _read_samples(index: ShardIndex, max_corrupt_fraction: float, seconds: float) -> ShardFacts:
    try:
        note = require_usable(index, max_corrupt_fraction) or ""
    except UsageError as error:
        return ShardFacts(index.fingerprint, len(index), refused=str(error))
    tried, read, unreadable = 0, 0, []
    started = time.perf_counter()
    for sample in first_and_last(index):
        if tried and time.perf_counter() - started > seconds:
            break
        tried += 1
        try:
            read += len(index.read(sample))
        except UnusableError as error:
            unreadable.append(f"{index.name_of(sample)} ({error})")
    taken = time.perf_counter() - started
    return ShardFacts(index.fingerprint, len(index), "", note, tried, tuple(unreadable), read, taken)


def first_and_last(index: ShardIndex) -> Iterator[int]:
    """The first and last usable samples of some shards, spread evenly over the index."""
    ends = np.cumsum([shard.samples for shard in index.shards])
    for shard in np.unique(np.linspace(0, len(ends) - 1, _SHARDS).astype(int)):
        start = int(ends[shard]) - index.shards[shard].samples
        usable = np.flatnonzero(is_usable(index.samples["state"][start : ends[shard]]))
        yield from (start + int(number) for number in np.unique(usable[[0, -1]] if len(usable) else usable))
