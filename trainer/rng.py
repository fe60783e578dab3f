"""Randomness as a function of where a run stands, so that no generator has to be saved."""

import numpy as np
import torch


def generator_at(*key: int) -> torch.Generator:
    """A generator whose stream belongs to this key, such as (seed, step, rank, micro_step)."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state)
