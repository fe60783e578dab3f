"""What can be said of a run's shards before it starts: are they all there, and are enough of their samples usable?"""

from collections import Counter

import numpy as np

from trainer.data.faults import Reason, describe, first_names
from trainer.data.index import ShardIndex
from trainer.errors import UsageError


def admit(index: ShardIndex, max_bad_share: float) -> str | None:
    """Accepts a directory whose unusable samples are fewer than the allowed share.

    Shards on a file system are compared with the index in size; of those behind a URL reading will tell.

    Returns:
        a sentence about what will be stepped over, if anything.

    Raises:
        UsageError: too many samples are unusable, or in shards that are missing or cut short.
    """
    altered = index.altered_shards() if index.store.directory is not None else {}
    numbers = [number for number, shard in enumerate(index.shards) if shard.name in altered]
    in_altered = np.isin(index.samples["shard"], numbers)
    states = index.samples["state"]
    unusable = states >= min(Reason)
    lost = int((unusable | in_altered).sum())
    if not lost:
        return None
    reasons = Counter(
        {
            Reason(state): int(count)
            for state, count in zip(*np.unique(states[unusable], return_counts=True), strict=True)
        }
    )
    parts = [f"{name} ({what})" for name, what in altered.items()]
    if reasons:
        parts.append(f"{describe(reasons)} when indexed")
    found = f"{lost} of {len(index)} samples in {index.store.location} cannot be used: {first_names(parts)}"
    if lost > max_bad_share * len(index):
        raise UsageError(
            f"{found}; more than data.max_bad_share={max_bad_share} allows: see 'mixmae shards check "
            f"{index.store.location}', restore the shards, or raise it"
        )
    return f"{found}; others take their places"
