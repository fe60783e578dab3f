"""Signals and the end of a job's time are noted, by name, and a second one changes nothing."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from mixmae.base.signals import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As they were before, afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop(number: signal.Signals) -> None:
    stop = StopRequest({})
    assert stop.reason(300) is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason(300) == number.name


def test_the_end_of_the_time_asks_to_stop() -> None:
    stop = StopRequest({"SLURM_JOB_END_TIME": str(int(time.time()) + 1000)})
    assert stop.reason(300) is None
    assert stop.reason(1010) == "less than 1010 s before the end of the job's time"
    assert StopRequest({"SLURM_JOB_END_TIME": "Unknown"}).reason(1e9) is None
