"""Requests to stop: a signal, or the end of a Slurm job's time limit. No torch, whose import takes seconds."""

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_END_TIME = "SLURM_JOB_END_TIME"


class StopRequest:
    """Whether this rank was asked to stop, and by what.

    Signals are only noted from now on: a second one does not kill a rank that is saving.
    """

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._signal: str | None = None
        self._end = float(env[_END_TIME]) if env.get(_END_TIME, "").isdigit() else None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number).name

    def reason(self, seconds_before_end: float) -> str | None:
        """What asks the run to stop; None if nothing does."""
        if self._signal is not None:
            return self._signal
        if self._end is not None and time.time() > self._end - seconds_before_end:
            return f"less than {seconds_before_end:g} s before the end of the job's time"
        return None


def leave_signals_to_the_main_process() -> None:
    """For data workers: signals that stop their rank reach them too, but they serve until it is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
