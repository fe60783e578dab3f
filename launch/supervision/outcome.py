"""The outcome of a start: one record, and the last message that a user sees."""

import json
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from mixmae.base.errors import ERROR
from mixmae.base.exit_codes import FAILED, FINISHED, PREEMPTED, USAGE_ERROR
from mixmae.base.files import atomic_write
from mixmae.base.json_text import parse_json
from mixmae.base.redaction import redact, redact_all
from mixmae.base.run_directory import OUTCOME

ENDED = "ended"
"""An empty file in an attempt's folder: a supervisor has ended, and the others will soon."""
USER = "the user"
"""Value of `stopped_by` if the command that started the run received the signal."""
_RANK = re.compile(r"^rank \d+: ")


@dataclass(frozen=True)
class Exit:
    """The exit of a rank's process.

    Attributes:
        code: exit code; None if a signal killed it.
        signal: number of that signal.
        lines: last lines of its output.
    """

    code: int | None
    signal: int | None = None
    lines: Sequence[str] = ()

    def describe(self) -> str:
        if self.signal is None:
            return f"ended with exit code {self.code}"
        hint = "; the kernel does that when the host runs out of memory" if self.signal == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(self.signal).name}{hint}"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a start.

    Attributes:
        code: exit code of the command, one of `mixmae.base.exit_codes`.
        reason: one line, without a full stop.
        step: the last step that any rank reached.
        rank: the first rank that failed, or the straggler; None if unknown.
        host: the host of that rank.
        exit_code: exit code of its process.
        signal: name of the signal that killed its process.
        log: file with its output.
        lines: last lines of its output.
        stopped_by: who stopped the run, if anybody: `USER`, or a rank and host.
        stop_signal: name of the signal that stopped it.
    """

    code: int
    reason: str
    step: int = 0
    rank: int | None = None
    host: str | None = None
    exit_code: int | None = None
    signal: str | None = None
    log: str | None = None
    lines: list[str] = field(default_factory=list)
    stopped_by: str | None = None
    stop_signal: str | None = None

    @classmethod
    def of_exit(cls, rank: int, host: str, ended: Exit) -> Self:
        """The failure of a run whose first failing rank exited like this."""
        return cls(
            USAGE_ERROR if ended.code == USAGE_ERROR else FAILED,
            f"rank {rank} on {host} {ended.describe()}",
            rank=rank,
            host=host,
            exit_code=ended.code,
            signal=None if ended.signal is None else signal.Signals(ended.signal).name,
            lines=list(ended.lines),
        )

    def with_lines(self, lines: Sequence[str]) -> Self:
        return replace(self, lines=list(lines))

    def to_json(self) -> dict[str, Any]:
        """Without credentials that a library may have printed."""
        values: dict[str, Any] = redact_all(asdict(self))
        return values

    def final_message(self) -> str:
        """The last message on the console; empty if the run finished, which its rank 0 has printed."""
        if self.code == FINISHED:
            return ""
        where = "" if self.rank is None else f"rank {self.rank} on {self.host}"
        errors = [line.removeprefix(ERROR) for line in self.lines if line.startswith(ERROR)]
        if errors:  # the rank said what is wrong: nothing else needs to be read
            return f"{ERROR}{_RANK.sub('', errors[-1])}{where and f' ({where})'}"
        shown = []
        if self.log is not None and self.lines:
            shown.append(f"mixmae: last lines of {self.log}{where and f', {where}'}:")
            shown += [f"    {redact(line)}" for line in self.lines]
        shown.append(f"mixmae: {'' if self.code == PREEMPTED else 'error: '}{self.reason}")
        return "\n".join(shown)


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Writes the outcome to an attempt's folder, atomically."""
    atomic_write(folder / OUTCOME, json.dumps(outcome.to_json(), indent=1) + "\n")


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome of an attempt; None if rank 0's supervisor wrote none, or a partial one."""
    try:
        return Outcome(**parse_json((folder / OUTCOME).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def mark_ended(folder: Path) -> None:
    """Signals the batch script that supervisors are ending; ignores errors such as a full disk."""
    with suppress(OSError):
        (folder / ENDED).touch()


def log_file(folder: Path, rank: int) -> Path:
    """The file with a rank's output."""
    return folder / f"rank-{rank:05d}.log"
