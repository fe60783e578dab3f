"""State of all ranks on rank 0's supervisor, and the decision how the run ends. Callers pass the time; none blocks."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixmae.base.exit_codes import FAILED, FINISHED, PREEMPTED
from mixmae.base.liveness import HEARTBEAT_SECONDS, SILENT_SECONDS
from mixmae.launch.supervision.outcome import USER, Exit, Outcome
from mixmae.launch.supervision.stuck import RankStatus, find_stragglers, is_stuck

SETTLE_SECONDS = 1.5
"""Seconds to collect reports after a failure: another rank may have failed earlier."""
_QUIET_SECONDS = 3 * HEARTBEAT_SECONDS
"""A rank silent for this long may be the cause of another rank's failure."""
LAUNCHER_SECONDS = 60.0
"""Seconds within which the launching process must open its control connection."""


@dataclass(frozen=True)
class Limits:
    """Timeouts in seconds.

    Attributes:
        join: for all ranks to join.
        stuck: without progress of any rank.
        grace: from a signal to stop, or the first rank's exit, to the exit of all.
    """

    join: float
    stuck: float
    grace: float


@dataclass
class Member:
    """A rank as its supervisor reports it; times are of this process's monotonic clock."""

    host: str
    heard: float
    status: RankStatus | None = None
    ended: Exit | None = None
    ended_at: float = 0.0
    lost: str | None = None
    """How its supervisor was lost, if it was."""

    def describe(self, rank: int) -> str:
        return f"rank {rank} on {self.host}"


class Membership:
    """All ranks of a start, and the launching process if it stays."""

    def __init__(self, world_size: int, limits: Limits, launcher: bool, now: float) -> None:
        self.world_size, self.limits, self._opened = world_size, limits, now
        self.members: dict[int, Member] = {}
        self.started: float | None = None
        self.stop: tuple[str, str] | None = None
        """The first signal to stop, and its receiver."""
        self._stop_at = 0.0
        self._abort: str | None = None
        self._launcher = "awaited" if launcher else "none"

    def join(self, rank: int, host: str, now: float) -> None:
        """Called when a rank's supervisor connects."""
        if rank in self.members:
            self.abort(f"rank {rank} joined twice, from {self.members[rank].host} and from {host}")
            return
        self.members[rank] = Member(host, now)

    def launcher_joined(self) -> None:
        self._launcher = "joined"

    @property
    def complete(self) -> bool:
        """Whether all have joined, so that the ranks can start."""
        return len(self.members) == self.world_size and self._launcher != "awaited"

    def start(self, now: float) -> None:
        """Called when the ranks are started."""
        self.started = now

    def heard_from(self, rank: int, now: float, status: RankStatus | None = None) -> None:
        """Called on every message of a rank's supervisor."""
        member = self.members[rank]
        member.heard = now
        if status is not None:
            member.status = status

    def rank_exited(self, rank: int, ended: Exit, at: float) -> None:
        """Called when a rank's process exited; the first report counts."""
        member = self.members[rank]
        if member.ended is None:
            member.ended, member.ended_at = ended, at

    def rank_lost(self, rank: int, now: float, how: str) -> None:
        """Called when a rank's supervisor is lost before it reported its rank's exit."""
        member = self.members[rank]
        if member.lost is None:
            member.lost, member.ended_at = how, now

    def abort(self, reason: str) -> None:
        """Ends the run at once."""
        self._abort = self._abort or reason

    def request_stop(self, name: str, who: str, now: float) -> None:
        """Called when a rank's supervisor or the launching process received a signal to stop."""
        if self.stop is None:
            self.stop, self._stop_at = (name, who), now

    @property
    def step(self) -> int:
        """The last step that any rank reached."""
        return max((member.status.step for member in self.members.values() if member.status), default=0)

    def outcome_at(self, now: float) -> Outcome | None:
        """The run's outcome at this time, or None while it continues."""
        outcome = self._outcome_at(now)
        if outcome is None or self.stop is None:
            return outcome and replace(outcome, step=self.step)
        return replace(outcome, step=self.step, stop_signal=self.stop[0], stopped_by=self.stop[1])

    def _outcome_at(self, now: float) -> Outcome | None:
        self._notice_silence(now)
        failed = self._first_failure()
        if failed is not None:
            return self._failure(failed) if self._abort or self._settled(failed, now) else None
        if self._abort is not None:
            return Outcome(FAILED, self._abort)
        if self.started is None:
            return self._before_the_start(now)
        left = [rank for rank, member in self.members.items() if member.ended is None]
        if not left:
            return self._finish()
        return self._overdue(left, now) or self._stuck(left)

    def _notice_silence(self, now: float) -> None:
        for rank, member in self.members.items():
            if now - member.heard > SILENT_SECONDS:
                self.rank_lost(rank, member.heard, f"has been silent for {SILENT_SECONDS:.0f} s; its host is down, "
                           "unreachable or overloaded, or its supervisor is stopped")  # fmt: skip

    def _first_failure(self) -> int | None:
        failed = [rank for rank, m in self.members.items() if m.lost is not None or self._is_failure(m.ended)]
        return min(failed, key=lambda rank: (self.members[rank].ended_at, rank), default=None)

    def _is_failure(self, ended: Exit | None) -> bool:
        if ended is None or ended.code in (FINISHED, PREEMPTED):
            return False
        stopped = (
            self.stop is not None and ended.signal is not None and signal.Signals(ended.signal).name == self.stop[0]
        )
        return not stopped  # a rank killed by the signal to stop had no handler yet, so nothing to save

    def _settled(self, failed: int, now: float) -> bool:
        if now < self.members[failed].ended_at + SETTLE_SECONDS:
            return False
        quiet = [m for m in self.members.values() if m.lost is None and now - m.heard > _QUIET_SECONDS]
        return not quiet

    def _failure(self, rank: int) -> Outcome:
        member = self.members[rank]
        if member.lost is not None:
            return Outcome(FAILED, f"{member.describe(rank)} {member.lost}", rank=rank, host=member.host)
        assert member.ended is not None
        return Outcome.of_exit(rank, member.host, member.ended)

    def _before_the_start(self, now: float) -> Outcome | None:
        if self.stop is not None:
            return Outcome(PREEMPTED, f"stopped {_by(*self.stop)} before the ranks started; nothing was done")
        if self._launcher == "awaited" and now - self._opened > LAUNCHER_SECONDS:
            return Outcome(FAILED, "the launching process never reached rank 0's host; they need a route to each "
                           "other, and launch.port must be open")  # fmt: skip
        missing = [rank for rank in range(self.world_size) if rank not in self.members]
        if missing and now - self._opened > self.limits.join:
            hosts = ", ".join(sorted({member.host for member in self.members.values()}))
            return Outcome(FAILED, f"{describe_ranks(missing)} did not join within {self.limits.join:.0f} s; only "
                           f"those on {hosts} did")  # fmt: skip
        return None

    def _finish(self) -> Outcome:
        if all(member.ended is not None and member.ended.code == FINISHED for member in self.members.values()):
            return Outcome(FINISHED, "finished")
        why = "before the end of its time limit" if self.stop is None else _by(*self.stop)
        return Outcome(PREEMPTED, f"stopped {why}; the same command continues the run")

    def _overdue(self, left: Sequence[int], now: float) -> Outcome | None:
        ends = [member.ended_at for member in self.members.values() if member.ended is not None]
        since = [*ends, *([self._stop_at] if self.stop else [])]
        if not since or now - min(since) <= self.limits.grace:
            return None
        event = "the signal to stop" if self.stop else "the first rank exited"
        overdue = f"had not exited {self.limits.grace:.0f} s after {event}"
        return self._blame(left, f"{describe_ranks(sorted(left))} {overdue}")

    def _stuck(self, left: Sequence[int]) -> Outcome | None:
        statuses = [status for rank in left if (status := self.members[rank].status) is not None]
        if len(statuses) < len(left) or not is_stuck(statuses, self.limits.stuck):
            return None
        return self._blame(left, f"stuck: no progress for {min(status.phase_seconds for status in statuses):.0f} s")

    def _blame(self, left: Sequence[int], what: str) -> Outcome:
        """A failure that names the straggler."""
        statuses = {rank: status for rank in left if (status := self.members[rank].status) is not None}
        ranks, why = find_stragglers(statuses) if statuses else ([], "no rank reported its phase")
        if not ranks:
            return Outcome(FAILED, f"{what}; {why}")
        first = self.members[ranks[0]]
        more = f" (and {describe_ranks(ranks[1:])})" if len(ranks) > 1 else ""
        reason = f"{what}; the straggler is {first.describe(ranks[0])}{more}: {why}"
        return Outcome(FAILED, reason, rank=ranks[0], host=first.host)


def _by(name: str, who: str) -> str:
    return "by the user" if who == USER else f"by {name} to {who}"


def describe_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 3, 4`, or the first few and their number."""
    shown = ", ".join(map(str, ranks[:8])) + (f", ... ({len(ranks)} of them)" if len(ranks) > 8 else "")
    return f"rank{'s'[: len(ranks) > 1]} {shown}"
