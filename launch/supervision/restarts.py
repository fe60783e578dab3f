"""Whether a run is started again: as long as it gets on. The record of it stays in the run directory."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmae.base import jsonl
from mixmae.base.exit_codes import FAILED, FINISHED, MISTAKE, PREEMPTED
from mixmae.base.run_directory import RESTARTS, newest_step
from mixmae.launch.supervision.outcome import USER, Outcome

_DELAY, _LONGEST_DELAY = 10.0, 300.0


@dataclass(frozen=True)
class Decision:
    """What to do after a start ended.

    Attributes:
        again: whether to start once more.
        words: what the user is told of it.
        delay: seconds to wait before; more where the last start did not get on either.
    """

    again: bool
    words: str = ""
    delay: float = 0.0

    def exit_code(self, outcome: Outcome) -> int:
        """What a command returns that does not start again: a run that no longer gets on has failed."""
        return FAILED if self.words else outcome.code


def decide(run_dir: Path, launch: str, outcome: Outcome, most: int) -> Decision:
    """Whether a run that ended so is started again.

    Args:
        launch: what the starts have in common that this one belongs to, such as a Slurm job.
        most: so many starts in a row that saved no further checkpoint are one too many.
    """
    if outcome.code in (FINISHED, MISTAKE) or outcome.stopped_by == USER or most == 0:
        return Decision(False)
    step = newest_step(run_dir)
    idle = _without_progress(run_dir, launch, step)
    if idle >= most:
        return Decision(False, f"not started again: {idle} restart{'s'[: idle > 1]} without progress, the newest "
                        f"checkpoint is still of step {step}")  # fmt: skip
    delay = 0.0 if idle == 0 else min(_LONGEST_DELAY, _DELAY * 3 ** (idle - 1))
    return Decision(True, f"starting again from step {step}", delay)


def _without_progress(run_dir: Path, launch: str, step: int) -> int:
    """Restarts of this launch, the last ones, at whose beginning the newest checkpoint was no older than now."""
    own = [record for record in read_restarts(run_dir) if record["launch"] == launch]
    return len(own) - max((number for number, record in enumerate(own, 1) if record["step"] < step), default=0)


def say(outcome: Outcome, decision: Decision) -> None:
    """The last that a user reads of a start."""
    words = [outcome.last_words(), decision.words and f"mixmae: {decision.words}"]
    print("\n".join(filter(None, words)), file=sys.stderr, flush=True)


def record_restart(run_dir: Path, launch: str, attempt: str, outcome: Outcome | None, **more: object) -> None:
    """Adds a line about a start that ended, at the beginning of the next.

    Args:
        attempt: the start that ended.
        outcome: None where it left no record, as when its first host went down.
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
