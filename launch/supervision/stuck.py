"""Whether a run is stuck, and which rank the others wait for."""

from collections.abc import Sequence
from dataclasses import dataclass

from mixmae.base.heartbeat import Beat

_SLOW_PARTS = ("starting", "checkpoint", "ending")
_SLOW = 3.0
"""How much longer than elsewhere nothing may move in these parts: compiling, joining, saving."""
_WAITING = ("forward", "backward", "optimizer")
"""Parts in which a rank waits for the others."""
_TICKS, _MANY_TICKS = 3.0, 10.0
"""An interpreter that did not tick for so many seconds is stopped, or hangs without releasing its lock: the second
number of them tells in any case, the first where its rank came to its part no longer than twice as long ago."""


@dataclass(frozen=True)
class Sighting:
    """Where a rank is, as its supervisor saw it.

    Attributes:
        step: optimizer steps done since the run began.
        part: one of `mixmae.base.phases.PHASES`.
        still: seconds since it came to that part.
        unticked: seconds since its interpreter last ran; 0 where it does not say.
    """

    step: int
    part: str
    still: float
    unticked: float


def sighting(beat: Beat | None, started: float, now: float) -> Sighting:
    """What a heartbeat says; a rank that wrote none since it was started is starting."""
    if beat is None:
        return Sighting(0, "starting", now - started, 0.0)
    return Sighting(beat.step, beat.phase, now - beat.since, now - beat.ticked)


def is_stuck(seen: Sequence[Sighting], stuck_seconds: float) -> bool:
    """Whether no rank moved for so long; longer while any of them starts, saves or ends."""
    if not seen:
        return False
    slow = any(rank.part in _SLOW_PARTS for rank in seen)
    return min(rank.still for rank in seen) > stuck_seconds * (_SLOW if slow else 1.0)


def late(seen: dict[int, Sighting]) -> tuple[list[int], str]:
    """The ranks that the others wait for, and what tells them apart; no ranks where nothing does.

    Args:
        seen: at least one rank's sighting, by rank.
    """
    stopped = [rank for rank, sight in seen.items() if _is_stopped(sight)]
    if stopped and len(stopped) < len(seen):
        return stopped, f"its interpreter has not run for {max(seen[rank].unticked for rank in stopped):.0f} s"
    apart = [rank for rank, sight in seen.items() if sight.part not in _WAITING]
    if apart and len(apart) < len(seen):
        there = seen[apart[0]]
        return apart, f"it is in {there.part} of step {there.step + 1} while the others wait in a later part"
    last = min(sight.step for sight in seen.values())
    behind = [rank for rank, sight in seen.items() if sight.step == last]
    if len(behind) < len(seen):
        return behind, f"it is at step {last + 1}, the others are ahead"
    parts = sorted({sight.part for sight in seen.values()})
    return [], f"all ranks are in {' or '.join(parts)} of step {last + 1}"


def _is_stopped(sight: Sighting) -> bool:
    return sight.unticked > max(_TICKS, min(_MANY_TICKS, sight.still / 2))
