"""Restart policy: a run is restarted as long as it makes progress. Restarts are recorded in the run directory."""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmae.base import jsonl
from mixmae.base.exit_codes import FAILED, FINISHED, PREEMPTED, USAGE_ERROR
from mixmae.base.run_directory import RESTARTS, newest_step
from mixmae.launch.supervision.outcome import USER, Outcome

_DELAY, _LONGEST_DELAY = 10.0, 300.0


@dataclass(frozen=True)
class Decision:
    """What to do after a start ended.

    Attributes:
        restart: whether to start the run again.
        message: message to the user.
        delay: seconds to wait before the restart; longer if the last restart made no progress either.
    """

    restart: bool
    message: str = ""
    delay: float = 0.0

    def exit_code(self, outcome: Outcome) -> int:
        """Exit code if the run is not restarted: a run that no longer makes progress has failed."""
        return FAILED if self.message else outcome.code


def decide(run_dir: Path, launch: str, outcome: Outcome, max_restarts: int) -> Decision:
    """Decides whether a run that ended like this is restarted.

    Args:
        launch: names the launch, such as a Slurm job, whose restarts are counted.
        max_restarts: restarts in a row without a new checkpoint after which the run is given up.
    """
    if outcome.code in (FINISHED, USAGE_ERROR) or outcome.stopped_by == USER or max_restarts == 0:
        return Decision(False)
    step = newest_step(run_dir)
    idle = _without_progress(run_dir, launch, step)
    if idle >= max_restarts:
        return Decision(False, f"not restarted: {idle} restart{'s'[: idle > 1]} without progress; the newest "
                        f"checkpoint is still step {step}")  # fmt: skip
    delay = 0.0 if idle == 0 else min(_LONGEST_DELAY, _DELAY * 3 ** (idle - 1))
    return Decision(True, f"restarting from step {step}", delay)


def _without_progress(run_dir: Path, launch: str, step: int) -> int:
    """Number of this launch's last restarts that began at the current newest checkpoint or a later one."""
    own = [record for record in read_restarts(run_dir) if record["launch"] == launch]
    return len(own) - max((number for number, record in enumerate(own, 1) if record["step"] < step), default=0)


def print_outcome(outcome: Outcome, decision: Decision) -> None:
    """Prints how a start ended and what follows."""
    messages = [outcome.final_message(), decision.message and f"mixmae: {decision.message}"]
    with suppress(BrokenPipeError):  # nobody reads any more; the record of the start says it too
        print("\n".join(filter(None, messages)), file=sys.stderr, flush=True)


def record_restart(run_dir: Path, launch: str, attempt: str, outcome: Outcome | None, **more: object) -> None:
    """Records how a start ended, when the next one begins.

    Args:
        attempt: the start that ended.
        outcome: None if it left none, for example because its first host went down.
    """
    record: dict[str, object] = {
        "time": round(time.time(), 3),
        "launch": launch,
        "attempt": attempt,
        "step": newest_step(run_dir),
        **_of(outcome),
        **more,
    }
    jsonl.append(run_dir / RESTARTS, record)


def _of(outcome: Outcome | None) -> dict[str, object]:
    if outcome is None:
        return {"reason": "lost", "message": "left no record: its first host went down, or it was requeued"}
    return {
        "reason": "preempted" if outcome.code == PREEMPTED else "failed",
        "message": outcome.reason,
        "exit_code": outcome.code if outcome.exit_code is None else outcome.exit_code,
        "signal": outcome.signal or outcome.stop_signal,
        "host": outcome.host,
        "rank": outcome.rank,
    }


def read_restarts(run_dir: Path) -> list[dict[str, Any]]:
    """All restarts of a run, oldest first."""
    return jsonl.read(run_dir / RESTARTS, "launch", "step")
