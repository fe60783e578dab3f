"""What all ranks do at the same step although only one of them knows of a reason."""

import enum

import torch
import torch.distributed as dist

from mixmae.trainer.engine.distributed import background_group


class Wish(enum.IntEnum):
    """What a rank wants of the run; of several wishes the highest counts."""

    GO_ON = 0
    STOP = 1
    """Save, and end so that the run can be continued."""
    GIVE_UP = 2
    """End as failed: checkpoints can no longer be saved."""


class Vote:
    """One small reduction a step, in the background: what is wished at a step is known to all at the next one.

    No rank waits for another here: a reduction is asked for its result one step after it was started.
    """

    def __init__(self) -> None:
        self._group = background_group()
        self._wish = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def cast(self, wish: Wish) -> Wish:
        """Says what this rank wishes, and returns what the ranks wished at the step before."""
        agreed = self._result()
        self._wish[0] = wish
        self._pending = dist.all_reduce(self._wish, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed

    def _result(self) -> Wish:
        if self._pending is None:
            return Wish.GO_ON
        self._pending.wait()
        return Wish(int(self._wish))
