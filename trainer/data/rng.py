"""Random number generators as functions of a key, so that no generator state has to be saved.

A key is (seed, and a position: epoch, sample, step, rank, ...); a purpose keeps equal keys of different users apart.
"""

from enum import IntEnum
from random import Random

import numpy as np
import torch
import xxhash


class Purpose(IntEnum):
    """What random numbers are for. Values are part of every key: once given, they stay."""

    ORDER = 1
    AUGMENTATION = 2
    INPUTS = 3
    DROP_PATH = 4
    WINDOW = 5
    REPLACEMENT = 6
    EVALUATION = 7


def numpy_at(purpose: Purpose, *key: int) -> np.random.Generator:
    """NumPy's generator of a key, such as (seed, epoch, sample)."""
    return np.random.default_rng([purpose, *key])


def random_at(purpose: Purpose, *key: int) -> Random:
    """The standard library's generator of a key: a fifth of the cost of NumPy's for the few numbers of a sample."""
    return Random(xxhash.xxh3_64_intdigest(repr((int(purpose), *key)).encode()))


def seed_at(purpose: Purpose, *key: int) -> int:
    """A 64-bit seed of a key, such as (seed, step, rank, micro_step)."""
    return int(np.random.SeedSequence([purpose, *key]).generate_state(1, np.uint64)[0])


def torch_at(purpose: Purpose, *key: int) -> torch.Generator:
    """torch's generator (CPU) of a key."""
    return torch.Generator().manual_seed(seed_at(purpose, *key))
