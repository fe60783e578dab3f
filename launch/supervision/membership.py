"""What the first rank's supervisor knows of all ranks, and what follows from it. Time is given, nothing waits."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixmae.base.exit_codes import FAILED, FINISHED, PREEMPTED
from mixmae.launch.supervision.outcome import USER, Exit, Outcome
from mixmae.launch.supervision.protocol import BEAT_SECONDS, SILENT_SECONDS
from mixmae.launch.supervision.stuck import Sighting, is_stuck, late

SETTLE_SECONDS = 1.5
"""After a failure, so long others are listened to: one of them may have failed earlier."""
_QUIET_SECONDS = 3 * BEAT_SECONDS
"""A rank that was not heard for so long may be the cause of another one's failure."""
LAUNCHER_SECONDS = 60.0
"""The launching process must have come to the lifeline by then."""


@dataclass(frozen=True)
class Limits:
    """Seconds after which a run that does not go on is ended.

    Attributes:
        join: for all ranks to be there.
        stuck: without any rank moving.
        grace: from a signal to stop, or the first rank's end, to the end of all.
    """

    join: float
    stuck: float
    grace: float


@dataclass
class Member:
    """A rank as its supervisor reported it; times are this process's monotonic clock."""

    host: str
    heard: float
    sighting: Sighting | None = None
    ended: Exit | None = None
    ended_at: float = 0.0
    lost: str | None = None
    """How its supervisor was lost, if it was."""

    def here(self, rank: int) -> str:
        return f"rank {rank} on {self.host}"


class Roll:
    """All ranks of a start, and the launching process where there is one."""

    def __init__(self, world_size: int, limits: Limits, launcher: bool, now: float) -> None:
        self.world_size, self.limits, self._opened = world_size, limits, now
        self.members: dict[int, Member] = {}
        self.started: float | None = None
        self.stop: tuple[str, str] | None = None
        """The first signal to stop, and who got it."""
        self._stop_at = 0.0
        self._abort: str | None = None
        self._launcher = "awaited" if launcher else "none"

    def join(self, rank: int, host: str, now: float) -> None:
        """A rank's supervisor is there."""
        if rank in self.members:
            self.abort(f"rank {rank} is there twice, on {self.members[rank].host} and on {host}")
            return
        self.members[rank] = Member(host, now)

    def launcher_joins(self) -> None:
        self._launcher = "there"

    @property
    def complete(self) -> bool:
        """Whether everybody is there, so that the ranks can start."""
        return len(self.members) == self.world_size and self._launcher != "awaited"

    def start(self, now: float) -> None:
        """The ranks were told to start."""
        self.started = now

    def hears(self, rank: int, now: float, sighting: Sighting | None = None) -> None:
        """Anything came from a rank's supervisor."""
        member = self.members[rank]
        member.heard = now
        if sighting is not None:
            member.sighting = sighting

    def ends(self, rank: int, ended: Exit, at: float) -> None:
        """A rank's process ended; the first report of it counts."""
        member = self.members[rank]
        if member.ended is None:
            member.ended, member.ended_at = ended, at

    def loses(self, rank: int, now: float, how: str) -> None:
        """A rank's supervisor is gone without having said that its rank is."""
        member = self.members[rank]
        if member.lost is None:
            member.lost, member.ended_at = how, now

    def abort(self, reason: str) -> None:
        """Ends the run at once."""
        self._abort = self._abort or reason

    def asks_to_stop(self, name: str, who: str, now: float) -> None:
        """A signal to stop came to a rank's supervisor or to the launching process."""
        if self.stop is None:
            self.stop, self._stop_at = (name, who), now

    @property
    def step(self) -> int:
        """The last step that any rank was seen at."""
        return max((member.sighting.step for member in self.members.values() if member.sighting), default=0)

    def judge(self, now: float) -> Outcome | None:
        """How the run ends, or None while it goes on."""
        outcome = self._judge(now)
        if outcome is None or self.stop is None:
            return outcome and replace(outcome, step=self.step)
        return replace(outcome, step=self.step, stop_signal=self.stop[0], stopped_by=self.stop[1])

    def _judge(self, now: float) -> Outcome | None:
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
                self.loses(rank, member.heard, f"was not heard for {SILENT_SECONDS:.0f} s; its host is down, "
                           "unreachable or overloaded, or its supervisor is stopped")  # fmt: skip

    def _first_failure(self) -> int | None:
        failed = [rank for rank, m in self.members.items() if m.lost is not None or self._is_failure(m.ended)]
        return min(failed, key=lambda rank: (self.members[rank].ended_at, rank), default=None)

    def _is_failure(self, ended: Exit | None) -> bool:
        if ended is None or ended.code in (FINISHED, PREEMPTED):
            return False
        asked = self.stop is not None and ended.signal is not None and signal.Signals(ended.signal).name == self.stop[0]
        return not asked  # a rank that was ended by the signal to stop had nothing to save yet

    def _settled(self, failed: int, now: float) -> bool:
        if now < self.members[failed].ended_at + SETTLE_SECONDS:
            return False
        quiet = [m for m in self.members.values() if m.lost is None and now - m.heard > _QUIET_SECONDS]
        return not quiet

    def _failure(self, rank: int) -> Outcome:
        member = self.members[rank]
        if member.lost is not None:
            return Outcome(FAILED, f"{member.here(rank)} {member.lost}", rank=rank, host=member.host)
        assert member.ended is not None
        return Outcome.of_exit(rank, member.host, member.ended)

    def _before_the_start(self, now: float) -> Outcome | None:
        if self.stop is not None:
            return Outcome(PREEMPTED, f"stopped {_by(*self.stop)} before the ranks started; nothing was done")
        if self._launcher == "awaited" and now - self._opened > LAUNCHER_SECONDS:
            return Outcome(FAILED, "the process that launches the run never reached its first rank; both need a route "
                           "to each other, and launch.port to be open")  # fmt: skip
        missing = [rank for rank in range(self.world_size) if rank not in self.members]
        if missing and now - self._opened > self.limits.join:
            hosts = ", ".join(sorted({member.host for member in self.members.values()}))
            return Outcome(FAILED, f"{ranks_in_words(missing)} did not report within {self.limits.join:.0f} s; there "
                           f"are only those on {hosts}")  # fmt: skip
        return None

    def _finish(self) -> Outcome:
        if all(member.ended is not None and member.ended.code == FINISHED for member in self.members.values()):
            return Outcome(FINISHED, "finished")
        why = "at the end of its time" if self.stop is None else _by(*self.stop)
        return Outcome(PREEMPTED, f"stopped {why}; the same command continues the run")

    def _overdue(self, left: Sequence[int], now: float) -> Outcome | None:
        ends = [member.ended_at for member in self.members.values() if member.ended is not None]
        since = [*ends, *([self._stop_at] if self.stop else [])]
        if not since or now - min(since) <= self.limits.grace:
            return None
        event = "the signal to stop" if self.stop else "the first end of a rank"
        overdue = f"had not ended {self.limits.grace:.0f} s after {event}"
        return self._blame(left, f"{ranks_in_words(sorted(left))} {overdue}")

    def _stuck(self, left: Sequence[int]) -> Outcome | None:
        seen = [sight for rank in left if (sight := self.members[rank].sighting) is not None]
        if len(seen) < len(left) or not is_stuck(seen, self.limits.stuck):
            return None
        return self._blame(left, f"stuck: nothing moved for {min(sight.still for sight in seen):.0f} s")

    def _blame(self, left: Sequence[int], what: str) -> Outcome:
        """A failure that names the rank which the others wait for."""
        seen = {rank: sight for rank in left if (sight := self.members[rank].sighting) is not None}
        ranks, why = late(seen) if seen else ([], "no rank said where it is")
        if not ranks:
            return Outcome(FAILED, f"{what}; {why}")
        first = self.members[ranks[0]]
        more = f" (and {ranks_in_words(ranks[1:])})" if len(ranks) > 1 else ""
        reason = f"{what}; late is {first.here(ranks[0])}{more}: {why}"
        return Outcome(FAILED, reason, rank=ranks[0], host=first.host)


def _by(name: str, who: str) -> str:
    return "by the user" if who == USER else f"by {name} to {who}"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 3, 4`, or the first few and how many there are."""
    shown = ", ".join(map(str, ranks[:8])) + (f", ... ({len(ranks)} of them)" if len(ranks) > 8 else "")
    return f"rank{'s'[: len(ranks) > 1]} {shown}"
