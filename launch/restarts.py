"""Whether a run is started again: as long as it gets on. The record of it stays in the run directory."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from launch.supervision.outcome import USER, Outcome
from trainer.exits import FINISHED, MISTAKE, PREEMPTED

FILE = "restarts.jsonl"
_NEWEST = Path("checkpoints", "newest")
_DELAY, _LONGEST_DELAY = 10.0, 300.0


@dataclass(frozen=True)
class Decision:
    """What to do after a start ended.

    Attributes:
        again: whether to start once more.
        words: why, for the user; empty where there is nothing to say.
        delay: seconds to wait before; more where the last start did not get on either.
    """

    again: bool
    words: str = ""
    delay: float = 0.0


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    file = run_dir / _NEWEST
    name = file.read_text().strip() if file.is_file() else ""
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


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
    """Restarts of this launch at whose beginning the newest checkpoint was the same as now."""
    count = 0
    for record in reversed(read_restarts(run_dir)):
        if record["launch"] != launch or record["step"] != step:
            break
        count += 1
    return count


def record_restart(run_dir: Path, launch: str, attempt: str, outcome: Outcome, **more: object) -> None:
    """Adds a line about the start that ended; a restart follows."""
    record = {
        "time": round(time.time(), 3),
        "launch": launch,
        "attempt": attempt,
        "reason": "preempted" if outcome.code == PREEMPTED else "failed",
        "message": outcome.reason,
        "exit_code": outcome.exit_code if outcome.exit_code is not None else outcome.code,
        "signal": outcome.signal or outcome.stop_signal,
        "step": newest_step(run_dir),
        "host": outcome.host,
        "rank": outcome.rank,
        **more,
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_restarts(run_dir: Path) -> list[dict[str, object]]:
    """All restarts of a run, oldest first."""
    file = run_dir / FILE
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
