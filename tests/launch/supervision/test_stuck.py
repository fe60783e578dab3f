"""Which rank the others wait for."""

import pytest

from mixmae.base.heartbeat import Beat
from mixmae.launch.supervision.stuck import RankStatus, find_stragglers, is_stuck, rank_status


def at(phase: str, step: int = 7, phase_seconds: float = 100.0, seconds_since_tick: float = 0.5) -> RankStatus:
    return RankStatus(step, phase, phase_seconds, seconds_since_tick)


@pytest.mark.parametrize(
    ("statuses", "ranks", "words"),
    [
        (
            [at("backward"), at("backward", seconds_since_tick=90), at("backward")],
            [1],
            "interpreter has not run for 90 s",
        ),
        (
            [at("backward", seconds_since_tick=90), at("data_wait")],
            [0],
            "interpreter",
        ),  # a stopped one before a waiting one
        ([at("optimizer"), at("data_wait"), at("backward")], [1], "in data_wait of step 8"),
        ([at("checkpoint"), at("forward"), at("forward")], [0], "in checkpoint of step 8"),
        ([at("between"), at("between"), at("forward")], [0, 1], "in between of step 8"),
        ([at("backward"), at("forward", step=6), at("backward")], [1], "at step 7, the others are ahead"),
        ([at("backward"), at("backward")], [], "all ranks are in backward of step 8"),
        ([at("backward"), at("forward")], [], "all ranks are in backward or forward of step 8"),
        ([at("backward", seconds_since_tick=90), at("backward", seconds_since_tick=90)], [], "all ranks"),
    ],
)
def test_the_straggler_is_found(statuses: list[RankStatus], ranks: list[int], words: str) -> None:
    found, why = find_stragglers(dict(enumerate(statuses)))
    assert found == ranks
    assert words in why


def test_a_short_pause_of_an_interpreter_is_no_stop() -> None:
    assert find_stragglers({0: at("backward", seconds_since_tick=4.0), 1: at("backward")})[0] == []
    assert find_stragglers(
        {0: at("backward", phase_seconds=5.0, seconds_since_tick=4.0), 1: at("backward", phase_seconds=5.0)}
    )[0] == [0]


def test_a_run_is_stuck_when_no_rank_moves() -> None:
    assert not is_stuck([at("backward", phase_seconds=601), at("forward", phase_seconds=10)], 600)
    assert is_stuck([at("backward", phase_seconds=601), at("forward", phase_seconds=602)], 600)
    assert not is_stuck([], 600)


@pytest.mark.parametrize("phase", ["starting", "checkpoint", "ending"])
def test_starting_and_saving_may_take_longer(phase: str) -> None:
    assert not is_stuck([at("backward", phase_seconds=601), at(phase, phase_seconds=601)], 600)
    assert is_stuck([at("backward", phase_seconds=1801), at(phase, phase_seconds=1801)], 600)


def test_a_rank_without_a_heartbeat_is_starting() -> None:
    assert rank_status(None, started=100.0, now=130.0) == RankStatus(0, "starting", 30.0, 0.0)
    beat = Beat(step=4, phase="forward", since=120.0, ticked=129.0)
    assert rank_status(beat, started=100.0, now=130.0) == RankStatus(4, "forward", 10.0, 1.0)
