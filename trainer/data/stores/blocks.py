"""Reading remote files: in blocks through the node's cache, with retries."""

import math
import os
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import xxhash

from mixmae.trainer.data.stores.cache import BlockCache
from mixmae.trainer.data.stores.store import CacheCounts, Store, plain_name
from mixmae.trainer.recipe.sections.data import Cache, Network

_MAX_DELAY = 30.0
_OUTAGE_SECONDS = 60.0
"""How long after a read failed in every try other reads get one try each."""
T = TypeVar("T")
_JITTER = random.SystemRandom()  # forked workers share the state of any other generator


class FinalError(OSError):
    """An error that no retry would change."""


class CachedStore(Store):
    """Reads blocks through the node's cache, and retries failed reads."""

    def __init__(
        self, location: str, network: Network, cache: Cache, block_bytes: int, first_delay: float = 0.5
    ) -> None:
        """Opens a store.

        Args:
            block_bytes: of every block but a file's last.
            first_delay: seconds before the second try, doubled before each further one.
        """
        super().__init__(location)
        self._network = network
        self._block_bytes = block_bytes
        self._first_delay = first_delay
        self._down_until = -math.inf
        self._cache = BlockCache(cache.dir, cache.max_bytes)
        self._location_hash = xxhash.xxh3_64_hexdigest(location.encode())

    @property
    def cache_counts(self) -> CacheCounts:
        return CacheCounts(self._cache.reads - self._cache.fetches, self._cache.fetches)

    def read(self, name: str, offset: int, size: int) -> bytes:
        return b"".join(
            self._cache.read(self._key(name, number), start, length, partial(self._fetch, name, number, start + length))
            for number, start, length in self._blocks(offset, size)
        )

    def forget(self, name: str, offset: int, size: int) -> None:
        for number, _, _ in self._blocks(offset, size):
            self._cache.drop(self._key(name, number))

    def close(self) -> None:
        self._cache.close()

    @abstractmethod
    def _load(self, name: str, number: int, least: int) -> bytes:
        """Reads a block once; at least `least` bytes of it are needed."""

    def _fetch(self, name: str, number: int, least: int) -> bytes:
        return self._with_retries(partial(self._load, name, number, least))

    def _with_retries(self, attempt: Callable[[], T]) -> T:
        """The result of an attempt, after at most `network.retries` retries."""
        retries = 0 if time.monotonic() < self._down_until else self._network.retries
        for number in range(retries):
            try:
                return attempt()
            except (FileNotFoundError, PermissionError, FinalError):
                raise
            except OSError:
                self._retried[os.getpid()] += 1
                delay = min(self._first_delay * 2**number, _MAX_DELAY)
                time.sleep(delay * _JITTER.uniform(0.75, 1.25))
        try:
            return attempt()
        except OSError:
            self._down_until = time.monotonic() + _OUTAGE_SECONDS
            raise

    def _key(self, name: str, number: int) -> str:
        return f"{self._location_hash}/{plain_name(name)}/{number}"

    def _blocks(self, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
        """The blocks of a range: number, start within the block, length."""
        end = offset + size
        while offset < end:
            number, start = divmod(offset, self._block_bytes)
            length = min(end - offset, self._block_bytes - start)
            yield number, start, length
            offset += length
