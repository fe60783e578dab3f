"""A stop signal of one rank is known to all at the next step."""

import pytest

from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.run.stop_signal import StopSignal, StopSignalReducer
from tests.helpers import run_ranks

pytestmark = pytest.mark.distributed


def reduce_all(ranks: Ranks, signals: list[list[StopSignal]]) -> list[StopSignal]:
    reducer = StopSignalReducer()
    return [reducer.all_reduce(signal) for signal in signals[ranks.rank]]


def test_all_learn_of_the_highest_signal_one_step_later() -> None:
    go, stop, abort = StopSignal.CONTINUE, StopSignal.STOP, StopSignal.ABORT
    signals = [[go, go, abort, go, go], [go, stop, stop, go, go], [go, go, go, go, stop]]
    assert run_ranks(reduce_all, 3, signals) == [[go, go, stop, abort, go]] * 3
