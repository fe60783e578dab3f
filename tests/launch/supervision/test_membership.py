"""What follows from what supervisors report, by a clock that the tests turn."""

import signal

import pytest

from mixmae.base.exit_codes import FAILED, FINISHED, PREEMPTED, USAGE_ERROR
from mixmae.base.liveness import SILENT_SECONDS
from mixmae.launch.supervision.membership import LAUNCHER_SECONDS, SETTLE_SECONDS, Limits, Membership
from mixmae.launch.supervision.outcome import USER, Exit, Outcome
from mixmae.launch.supervision.stuck import RankStatus

LIMITS = Limits(join=60, stuck=100, grace=30)


def members_of(ranks: int, launcher: bool = False) -> Membership:
    """All ranks there and started at second 0."""
    membership = Membership(ranks, LIMITS, launcher, 0.0)
    for rank in range(ranks):
        membership.join(rank, f"node{rank // 2 + 1}", 0.0)
    if not launcher:
        membership.start(0.0)
    return membership


def hear_from_all(membership: Membership, now: float, but: tuple[int, ...] = ()) -> None:
    for rank in membership.members:
        if rank not in but:
            membership.heard_from(rank, now)


def outcome_of(membership: Membership, now: float) -> Outcome:
    outcome = membership.outcome_at(now)
    assert outcome is not None
    return outcome


def test_a_run_is_finished_when_all_ranks_are() -> None:
    membership = members_of(2)
    membership.heard_from(0, 3.0, RankStatus(9, "ending", 0.0, 0.0))
    membership.rank_exited(0, Exit(0), 5.0)
    hear_from_all(membership, 5.0)
    assert membership.outcome_at(5.0) is None
    membership.rank_exited(1, Exit(0), 5.5)
    assert (outcome_of(membership, 5.5).code, outcome_of(membership, 5.5).step) == (FINISHED, 9)


def test_the_first_failure_counts_whoever_reports_first() -> None:
    membership = members_of(4)
    membership.rank_exited(0, Exit(1, lines=["Connection reset by peer"]), 10.3)
    membership.rank_exited(3, Exit(None, signal.SIGKILL, ["step 7"]), 10.0)
    hear_from_all(membership, 11.0)
    assert membership.outcome_at(10.0 + SETTLE_SECONDS - 0.1) is None
    outcome = outcome_of(membership, 10.0 + SETTLE_SECONDS)
    assert (outcome.code, outcome.rank, outcome.host, outcome.signal) == (FAILED, 3, "node2", "SIGKILL")
    assert outcome.reason.startswith("rank 3 on node2 was killed by SIGKILL")
    assert outcome.lines == ["step 7"]


def test_a_usage_error_keeps_its_code() -> None:
    membership = members_of(2)
    membership.rank_exited(1, Exit(2, lines=["mixmae: error: no"]), 1.0)
    assert outcome_of(membership, 3.0).code == USAGE_ERROR


def test_a_failure_waits_for_a_silent_rank_that_may_be_its_cause() -> None:
    membership = members_of(4)
    hear_from_all(membership, 100.0)
    membership.rank_exited(0, Exit(1), 108.0)
    hear_from_all(membership, 110.0, but=(2, 3))
    assert membership.outcome_at(110.0) is None  # node2 was not heard for ten seconds
    hear_from_all(membership, 100.5 + SILENT_SECONDS, but=(2, 3))
    outcome = outcome_of(membership, 100.5 + SILENT_SECONDS)
    assert (outcome.rank, outcome.host) == (2, "node2")
    assert "has been silent for 20 s" in outcome.reason


def test_a_lost_supervisor_is_a_failure() -> None:
    membership = members_of(2)
    membership.rank_lost(1, 4.0, "lost its supervisor")
    assert outcome_of(membership, 6.0).reason == "rank 1 on node1 lost its supervisor"


def test_missing_ranks_are_named() -> None:
    membership = Membership(4, LIMITS, False, 0.0)
    membership.join(0, "node1", 1.0)
    membership.join(1, "node1", 1.0)
    hear_from_all(membership, 60.5)
    assert not membership.complete
    assert membership.outcome_at(59.0) is None
    outcome = outcome_of(membership, 60.5)
    assert outcome.code == FAILED
    assert outcome.reason == "ranks 2, 3 did not join within 60 s; only those on node1 did"


def test_a_rank_that_joins_twice_is_named() -> None:
    membership = members_of(2)
    membership.join(1, "node7", 2.0)
    assert "rank 1 joined twice, from node1 and from node7" in outcome_of(membership, 2.0).reason


def test_the_launching_process_must_come() -> None:
    membership = members_of(2, launcher=True)
    assert not membership.complete
    hear_from_all(membership, LAUNCHER_SECONDS + 1)
    assert "never reached rank 0's host" in outcome_of(membership, LAUNCHER_SECONDS + 1).reason
    membership = members_of(2, launcher=True)
    membership.launcher_joined()
    assert membership.complete


def test_a_stop_that_all_ranks_followed() -> None:
    membership = members_of(2)
    membership.request_stop("SIGUSR1", "rank 1 on node1", 5.0)
    membership.rank_exited(0, Exit(PREEMPTED), 9.0)
    membership.rank_exited(1, Exit(PREEMPTED), 9.0)
    outcome = outcome_of(membership, 9.0)
    assert (outcome.code, outcome.stopped_by, outcome.stop_signal) == (PREEMPTED, "rank 1 on node1", "SIGUSR1")
    assert outcome.reason == "stopped by SIGUSR1 to rank 1 on node1; the same command continues the run"


def test_a_rank_killed_by_the_stop_signal_did_not_fail() -> None:
    membership = members_of(2)
    membership.request_stop("SIGTERM", USER, 0.5)
    membership.rank_exited(0, Exit(None, signal.SIGTERM), 0.6)
    membership.rank_exited(1, Exit(None, signal.SIGTERM), 0.6)
    outcome = outcome_of(membership, 3.0)
    assert (outcome.code, outcome.reason) == (PREEMPTED, "stopped by the user; the same command continues the run")


def test_a_signal_that_nobody_sent_is_a_failure() -> None:
    membership = members_of(1)
    membership.rank_exited(0, Exit(None, signal.SIGTERM), 0.6)
    assert outcome_of(membership, 3.0).code == FAILED


def test_a_stop_before_the_start() -> None:
    membership = Membership(2, LIMITS, False, 0.0)
    membership.request_stop("SIGTERM", USER, 1.0)
    assert outcome_of(membership, 1.0).reason == "stopped by the user before the ranks started; nothing was done"


@pytest.mark.parametrize("stop", [True, False])
def test_ranks_that_do_not_end_in_time_are_named(stop: bool) -> None:
    membership = members_of(3)
    if stop:
        membership.request_stop("SIGTERM", USER, 5.0)
    membership.rank_exited(0, Exit(PREEMPTED), 6.0)
    hear_from_all(membership, 36.5)
    membership.heard_from(1, 36.5, RankStatus(4, "backward", 20.0, 0.1))
    membership.heard_from(2, 36.5, RankStatus(4, "checkpoint", 20.0, 0.1))
    assert membership.outcome_at(34.0) is None
    outcome = outcome_of(membership, 36.5)
    assert (outcome.code, outcome.rank) == (FAILED, 2)
    event = "the signal to stop" if stop else "the first rank exited"
    assert f"ranks 1, 2 had not exited 30 s after {event}; the straggler is rank 2 on node2" in outcome.reason


def test_a_stuck_run_names_the_straggler() -> None:
    membership = members_of(4)
    for rank in range(4):
        phase = "data_wait" if rank == 3 else "backward"
        membership.heard_from(rank, 200.0, RankStatus(41, phase, 99.0, 0.1))
    assert membership.outcome_at(200.0) is None
    for rank in range(4):
        phase = "data_wait" if rank == 3 else "backward"
        membership.heard_from(rank, 202.0, RankStatus(41, phase, 101.0, 0.1))
    outcome = outcome_of(membership, 202.0)
    assert (outcome.code, outcome.rank, outcome.host, outcome.step) == (FAILED, 3, "node2", 41)
    assert outcome.reason.startswith("stuck: no progress for 101 s; the straggler is rank 3 on node2: it is in data")


def test_a_stuck_run_without_a_straggler_names_none() -> None:
    membership = members_of(2)
    for rank in range(2):
        membership.heard_from(rank, 200.0, RankStatus(41, "backward", 101.0, 0.1))
    outcome = outcome_of(membership, 200.0)
    assert outcome.rank is None
    assert outcome.reason == "stuck: no progress for 101 s; all ranks are in backward of step 42"


def test_an_abort_ends_at_once_but_hides_no_failure() -> None:
    membership = members_of(2)
    membership.abort("stopped at once by the user")
    assert outcome_of(membership, 0.0).reason == "stopped at once by the user"
    membership.rank_exited(1, Exit(1), 0.5)
    assert outcome_of(membership, 0.5).rank == 1


def test_the_final_message_ends_with_the_reason() -> None:
    outcome = Outcome.of_exit(3, "node2", Exit(1, lines=["Traceback", "ValueError: no"]))
    words = Outcome(**{**outcome.to_json(), "log": "runs/x/logs/a/rank-00003.log"}).final_message()
    assert words.splitlines() == [
        "mixmae: last lines of runs/x/logs/a/rank-00003.log, rank 3 on node2:",
        "    Traceback",
        "    ValueError: no",
        "mixmae: error: rank 3 on node2 ended with exit code 1",
    ]
    assert Outcome(FINISHED, "finished").final_message() == ""


def test_an_error_in_words_is_the_whole_final_message() -> None:
    lines = ["a warning", "mixmae: error: rank 3: unknown key 'encoder.depht'", "[ERROR] a launcher's"]
    outcome = Outcome.of_exit(3, "node2", Exit(USAGE_ERROR, lines=lines))
    assert outcome.final_message() == "mixmae: error: unknown key 'encoder.depht' (rank 3 on node2)"
