"""What follows from what supervisors report, by a clock that the tests turn."""

import signal

import pytest

from mixmae.base.exit_codes import FAILED, FINISHED, MISTAKE, PREEMPTED
from mixmae.launch.supervision.membership import LAUNCHER_SECONDS, SETTLE_SECONDS, Limits, Roll
from mixmae.launch.supervision.outcome import USER, Exit, Outcome
from mixmae.launch.supervision.protocol import SILENT_SECONDS
from mixmae.launch.supervision.stuck import Sighting

LIMITS = Limits(join=60, stuck=100, grace=30)


def roll_of(ranks: int, launcher: bool = False) -> Roll:
    """All ranks there and started at second 0."""
    roll = Roll(ranks, LIMITS, launcher, 0.0)
    for rank in range(ranks):
        roll.join(rank, f"node{rank // 2 + 1}", 0.0)
    if not launcher:
        roll.start(0.0)
    return roll


def hear_all(roll: Roll, now: float, but: tuple[int, ...] = ()) -> None:
    for rank in roll.members:
        if rank not in but:
            roll.hears(rank, now)


def judged(roll: Roll, now: float) -> Outcome:
    outcome = roll.judge(now)
    assert outcome is not None
    return outcome


def test_a_run_is_finished_when_all_ranks_are() -> None:
    roll = roll_of(2)
    roll.hears(0, 3.0, Sighting(9, "ending", 0.0, 0.0))
    roll.ends(0, Exit(0), 5.0)
    hear_all(roll, 5.0)
    assert roll.judge(5.0) is None
    roll.ends(1, Exit(0), 5.5)
    assert (judged(roll, 5.5).code, judged(roll, 5.5).step) == (FINISHED, 9)


def test_the_first_failure_counts_whoever_reports_first() -> None:
    roll = roll_of(4)
    roll.ends(0, Exit(1, lines=["Connection reset by peer"]), 10.3)
    roll.ends(3, Exit(None, signal.SIGKILL, ["step 7"]), 10.0)
    hear_all(roll, 11.0)
    assert roll.judge(10.0 + SETTLE_SECONDS - 0.1) is None
    outcome = judged(roll, 10.0 + SETTLE_SECONDS)
    assert (outcome.code, outcome.rank, outcome.host, outcome.signal) == (FAILED, 3, "node2", "SIGKILL")
    assert outcome.reason.startswith("rank 3 on node2 was killed by SIGKILL")
    assert outcome.lines == ["step 7"]


def test_a_mistake_keeps_its_code() -> None:
    roll = roll_of(2)
    roll.ends(1, Exit(2, lines=["mixmae: error: no"]), 1.0)
    assert judged(roll, 3.0).code == MISTAKE


def test_a_failure_waits_for_a_silent_rank_that_may_be_its_cause() -> None:
    roll = roll_of(4)
    hear_all(roll, 100.0)
    roll.ends(0, Exit(1), 108.0)
    hear_all(roll, 110.0, but=(2, 3))
    assert roll.judge(110.0) is None  # node2 was not heard for ten seconds
    hear_all(roll, 100.5 + SILENT_SECONDS, but=(2, 3))
    outcome = judged(roll, 100.5 + SILENT_SECONDS)
    assert (outcome.rank, outcome.host) == (2, "node2")
    assert "was not heard for 20 s" in outcome.reason


def test_a_lost_supervisor_is_a_failure() -> None:
    roll = roll_of(2)
    roll.loses(1, 4.0, "lost its supervisor")
    assert judged(roll, 6.0).reason == "rank 1 on node1 lost its supervisor"


def test_missing_ranks_are_named() -> None:
    roll = Roll(4, LIMITS, False, 0.0)
    roll.join(0, "node1", 1.0)
    roll.join(1, "node1", 1.0)
    hear_all(roll, 60.5)
    assert not roll.complete
    assert roll.judge(59.0) is None
    outcome = judged(roll, 60.5)
    assert outcome.code == FAILED
    assert outcome.reason == "ranks 2, 3 did not report within 60 s; there are only those on node1"


def test_a_rank_that_is_there_twice_is_named() -> None:
    roll = roll_of(2)
    roll.join(1, "node7", 2.0)
    assert "rank 1 is there twice, on node1 and on node7" in judged(roll, 2.0).reason


def test_the_launching_process_must_come() -> None:
    roll = roll_of(2, launcher=True)
    assert not roll.complete
    hear_all(roll, LAUNCHER_SECONDS + 1)
    assert "never reached its first rank" in judged(roll, LAUNCHER_SECONDS + 1).reason
    roll = roll_of(2, launcher=True)
    roll.launcher_joins()
    assert roll.complete


def test_a_stop_that_all_ranks_followed() -> None:
    roll = roll_of(2)
    roll.asks_to_stop("SIGUSR1", "rank 1 on node1", 5.0)
    roll.ends(0, Exit(PREEMPTED), 9.0)
    roll.ends(1, Exit(PREEMPTED), 9.0)
    outcome = judged(roll, 9.0)
    assert (outcome.code, outcome.stopped_by, outcome.stop_signal) == (PREEMPTED, "rank 1 on node1", "SIGUSR1")
    assert outcome.reason == "stopped by SIGUSR1 to rank 1 on node1; the same command continues the run"


def test_a_rank_that_the_stop_found_unprepared_did_not_fail() -> None:
    roll = roll_of(2)
    roll.asks_to_stop("SIGTERM", USER, 0.5)
    roll.ends(0, Exit(None, signal.SIGTERM), 0.6)
    roll.ends(1, Exit(None, signal.SIGTERM), 0.6)
    outcome = judged(roll, 3.0)
    assert (outcome.code, outcome.reason) == (PREEMPTED, "stopped by the user; the same command continues the run")


def test_a_signal_that_nobody_sent_is_a_failure() -> None:
    roll = roll_of(1)
    roll.ends(0, Exit(None, signal.SIGTERM), 0.6)
    assert judged(roll, 3.0).code == FAILED


def test_a_stop_before_the_start() -> None:
    roll = Roll(2, LIMITS, False, 0.0)
    roll.asks_to_stop("SIGTERM", USER, 1.0)
    assert judged(roll, 1.0).reason == "stopped by the user before the ranks started; nothing was done"


@pytest.mark.parametrize("stop", [True, False])
def test_ranks_that_do_not_end_in_time_are_named(stop: bool) -> None:
    roll = roll_of(3)
    if stop:
        roll.asks_to_stop("SIGTERM", USER, 5.0)
    roll.ends(0, Exit(PREEMPTED), 6.0)
    hear_all(roll, 36.5)
    roll.hears(1, 36.5, Sighting(4, "backward", 20.0, 0.1))
    roll.hears(2, 36.5, Sighting(4, "checkpoint", 20.0, 0.1))
    assert roll.judge(34.0) is None
    outcome = judged(roll, 36.5)
    assert (outcome.code, outcome.rank) == (FAILED, 2)
    event = "the signal to stop" if stop else "the first end of a rank"
    assert f"ranks 1, 2 had not ended 30 s after {event}; late is rank 2 on node2" in outcome.reason


def test_a_stuck_run_names_the_late_rank() -> None:
    roll = roll_of(4)
    for rank in range(4):
        part = "data_wait" if rank == 3 else "backward"
        roll.hears(rank, 200.0, Sighting(41, part, 99.0, 0.1))
    assert roll.judge(200.0) is None
    for rank in range(4):
        part = "data_wait" if rank == 3 else "backward"
        roll.hears(rank, 202.0, Sighting(41, part, 101.0, 0.1))
    outcome = judged(roll, 202.0)
    assert (outcome.code, outcome.rank, outcome.host, outcome.step) == (FAILED, 3, "node2", 41)
    assert outcome.reason.startswith("stuck: nothing moved for 101 s; late is rank 3 on node2: it is in data_wait")


def test_a_stuck_run_without_a_late_rank_blames_none() -> None:
    roll = roll_of(2)
    for rank in range(2):
        roll.hears(rank, 200.0, Sighting(41, "backward", 101.0, 0.1))
    outcome = judged(roll, 200.0)
    assert outcome.rank is None
    assert outcome.reason == "stuck: nothing moved for 101 s; all ranks are in backward of step 42"


def test_an_abort_ends_at_once_but_hides_no_failure() -> None:
    roll = roll_of(2)
    roll.abort("ended at once by the user")
    assert judged(roll, 0.0).reason == "ended at once by the user"
    roll.ends(1, Exit(1), 0.5)
    assert judged(roll, 0.5).rank == 1


def test_last_words_end_with_the_reason() -> None:
    outcome = Outcome.of_exit(3, "node2", Exit(1, lines=["Traceback", "ValueError: no"]))
    words = Outcome(**{**outcome.to_json(), "log": "runs/x/logs/a/rank-00003.log"}).last_words()
    assert words.splitlines() == [
        "mixmae: last lines of runs/x/logs/a/rank-00003.log, rank 3 on node2:",
        "    Traceback",
        "    ValueError: no",
        "mixmae: error: rank 3 on node2 ended with exit code 1",
    ]
    assert Outcome(FINISHED, "finished").last_words() == ""
