"""The run's events, `events.jsonl`: a line per logged step and per thing that happened, over all attempts."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmae.base import jsonl
from mixmae.base.jsonl import JsonLines
from mixmae.base.run_directory import EVENTS
from mixmae.trainer.recipe.resume_rules import Change

_logger = logging.getLogger(__name__)

_ATTEMPT, _REFUSED = "attempt", "refused"
_ENDS = {"preempted": "preempted", "failed": "failed", "end": "finished"}
"""Events that end an attempt; one without them was killed."""


class Events:
    """`events.jsonl`: append-only, one JSON object a line, on disk as written; null where a number is not finite."""

    def __init__(self, run_dir: Path) -> None:
        self._lines = JsonLines(run_dir / EVENTS)

    def write(self, event: str, **fields: Any) -> None:
        """Appends an event.

        Raises:
            OSError: it could not be written, or not all of it.
        """
        self._lines.write({"event": event, "time": round(time.time(), 3), **fields})

    def close(self) -> None:
        self._lines.close()


def read_events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The events of one kind, by step; of a step that was done again after a restart, the last."""
    records = _records(run_dir)
    by_step = {
        record["step"]: record for record in records if record["event"] == event and isinstance(record.get("step"), int)
    }
    return [by_step[step] for step in sorted(by_step)]


def begin_attempt(run_dir: Path) -> list[str]:
    """Records that the run is about to start; returns how each attempt before ended, see `past_ends`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    ends = past_ends(run_dir)
    again = f"starting again; attempts before: {len(ends)}, the last of them {ends[-1]}" if ends else "starting"
    _note(run_dir, _ATTEMPT, message=again)
    return ends


def refuse_attempt(run_dir: Path, why: str) -> None:
    """Records that the start was refused: no attempt at all."""
    _note(run_dir, _REFUSED, message=why)


def fail_attempt(run_dir: Path, why: str) -> None:
    """Records that the start failed before there was a run to say it."""
    _note(run_dir, "failed", message=f"at the start: {why}")


def record_changes(run_dir: Path, step: int, changes: Sequence[Change]) -> None:
    """Records what a run goes on with changed on purpose, and says so."""
    message = f"from step {step} on changed: {', '.join(map(str, changes))}"
    _logger.info(message)
    values = {change.path: [change.then, change.now] for change in changes}
    _note(run_dir, "changed", message=message, step=step, changes=values)


def _note(run_dir: Path, event: str, **fields: Any) -> None:
    events = Events(run_dir)
    events.write(event, **fields)
    events.close()


def past_ends(run_dir: Path) -> list[str]:
    """How each attempt at the run ended so far, one of `mixmae.monitoring.metrics.ENDS`, oldest first."""
    ends: list[str] = []
    for record in _records(run_dir):
        event = record["event"]
        if event == _ATTEMPT:
            ends.append("killed")
        elif event == _REFUSED and ends:
            ends.pop()
        elif event in _ENDS and ends:
            ends[-1] = _ENDS[event]
    return ends


def restarted(ends: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """What the first event of an attempt says of the ones before: how the last ended, and Slurm's count of restarts."""
    fields: dict[str, Any] = {"reason": ends[-1]} if ends else {}
    if env.get("SLURM_RESTART_COUNT", "").isdigit():
        fields["slurm_restart_count"] = int(env["SLURM_RESTART_COUNT"])
    return fields


def _records(run_dir: Path) -> list[dict[str, Any]]:
    return jsonl.read(run_dir / EVENTS, "event")
