"""Detection of stuck runs and their stragglers: the ranks that the others wait for."""

from collections.abc import Sequence
from dataclasses import dataclass

from mixmae.base.heartbeat import Beat

_SLOW_PHASES = ("starting", "checkpoint", "ending")
_SLOW = 3.0
"""Factor of the timeout in these phases: compiling, joining, saving."""
_WAITING = ("forward", "backward", "optimizer")
"""Phases in which a rank waits for others in collectives."""
_TICKS, _MANY_TICKS = 3.0, 10.0
"""An interpreter without a tick for the second number of seconds is stopped, or hangs without releasing the GIL; if
its rank entered its phase at most twice as long ago, the first number suffices.
"""


@dataclass(frozen=True)
class RankStatus:
    """Status of a rank, as its supervisor reports it.

    Attributes:
        step: optimizer steps completed since the run began.
        phase: one of `mixmae.base.phases.PHASES`.
        phase_seconds: since it entered that phase.
        seconds_since_tick: since its interpreter last ran; 0 if unknown.
    """

    step: int
    phase: str
    phase_seconds: float
    seconds_since_tick: float


def rank_status(beat: Beat | None, started: float, now: float) -> RankStatus:
    """The status in a heartbeat; a rank without one is starting."""
    if beat is None:
        return RankStatus(0, "starting", now - started, 0.0)
    return RankStatus(beat.step, beat.phase, now - beat.since, now - beat.ticked)


def is_stuck(statuses: Sequence[RankStatus], stuck_seconds: float) -> bool:
    """Whether no rank made progress for `stuck_seconds`, or three times that while any starts, saves or ends."""
    if not statuses:
        return False
    slow = any(rank.phase in _SLOW_PHASES for rank in statuses)
    return min(rank.phase_seconds for rank in statuses) > stuck_seconds * (_SLOW if slow else 1.0)


def find_stragglers(statuses: dict[int, RankStatus]) -> tuple[list[int], str]:
    """The ranks that the others wait for, and the evidence; no ranks if undetermined.

    Args:
        statuses: at least one rank's status, by rank.
    """
    stopped = [rank for rank, status in statuses.items() if _is_stopped(status)]
    if stopped and len(stopped) < len(statuses):
        silent = max(statuses[rank].seconds_since_tick for rank in stopped)
        return stopped, f"its interpreter has not run for {silent:.0f} s"
    apart = [rank for rank, status in statuses.items() if status.phase not in _WAITING]
    if apart and len(apart) < len(statuses):
        there = statuses[apart[0]]
        return apart, f"it is in {there.phase} of step {there.step + 1} while the others wait in a later phase"
    last = min(status.step for status in statuses.values())
    behind = [rank for rank, status in statuses.items() if status.step == last]
    if len(behind) < len(statuses):
        return behind, f"it is at step {last + 1}, the others are ahead"
    phases = sorted({status.phase for status in statuses.values()})
    return [], f"all ranks are in {' or '.join(phases)} of step {last + 1}"


def _is_stopped(status: RankStatus) -> bool:
    return status.seconds_since_tick > max(_TICKS, min(_MANY_TICKS, status.phase_seconds / 2))
