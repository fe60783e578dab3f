"""The stop signal: what all ranks do after the same step although only one of them knows of a reason."""

import enum

import torch
import torch.distributed as dist

from mixmae.trainer.engine.distributed import background_group


class StopSignal(enum.IntEnum):
    """What a rank asks for; of several signals the highest counts."""

    CONTINUE = 0
    STOP = 1
    """Save, and end so that the run can be resumed."""
    ABORT = 2
    """End as failed: checkpoints can no longer be saved."""


class StopSignalReducer:
    """One small all-reduce a step, in the background: the signals of a step are known to all ranks at the next one.

    No rank waits for another here: a reduction is asked for its result one step after it was started.
    """

    def __init__(self) -> None:
        self._group = background_group()
        self._signal = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def all_reduce(self, signal: StopSignal) -> StopSignal:
        """Starts to reduce this rank's signal, and returns the highest of all ranks at the step before."""
        highest = self._result()
        self._signal[0] = signal
        self._pending = dist.all_reduce(self._signal, dist.ReduceOp.MAX, self._group, async_op=True)
        return highest

    def _result(self) -> StopSignal:
        if self._pending is None:
            return StopSignal.CONTINUE
        self._pending.wait()
        return StopSignal(int(self._signal))
