"""The findings of the checks: one line each, as a table, as JSON and as an exit code. No torch."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixmae.base.exit_codes import FAILED, FINISHED
from mixmae.base.redaction import redact

_NARROW, _ENDLESS = 140, 10_000
"""Columns of a terminal that a table needs; and of a file, where every line stays whole."""
_SHOWN = 4


class Level(IntEnum):
    """How bad it is. A run may start with warnings; an error stops it."""

    OK = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()


_STYLES = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "bold yellow", Level.ERROR: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        check: what was checked.
        where: host, rank, file, or how many hosts.
        found: the value.
        expected: what it should have been; empty where there is no such thing.
        advice: what to do; never empty in a warning or an error.
    """

    level: Level
    check: str
    where: str
    found: str
    expected: str = ""
    advice: str = ""

    def __post_init__(self) -> None:
        assert self.level < Level.WARNING or self.advice, self
        for name in ("where", "found", "expected", "advice"):
            object.__setattr__(self, name, redact(getattr(self, name)))

    def line(self) -> str:
        """As one line of text."""
        expected = f", expected {self.expected}" if self.expected else ""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.level}: {self.check}: {self.where}: {self.found}{expected}{advice}"

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"level": str(self.level)})


def finding_of(fields: Mapping[str, Any]) -> Finding:
    """What `Finding.to_json` wrote.

    Raises:
        KeyError, TypeError: something else.
    """
    return Finding(**{**fields, "level": Level[str(fields["level"]).upper()]})


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """By level; within one level in the order given."""
    return sorted(findings, key=lambda finding: -finding.level)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if there is an error."""
    return FAILED if any(finding.level is Level.ERROR for finding in findings) else FINISHED


def summary_line(findings: Sequence[Finding]) -> str:
    """The last line of a report."""
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    named = [f"{counts[level]} {level}{'s'[: counts[level] != 1]}" for level in (Level.ERROR, Level.WARNING)]
    state = "not ready" if counts[Level.ERROR] else "ready"
    return f"{state}: {', '.join(named)} in {len(findings)} findings"


def as_document(findings: Sequence[Finding]) -> str:
    """All of it as one JSON document."""
    lines = ",\n  ".join(finding.to_json() for finding in worst_first(findings))
    return f'{{"exit_code": {exit_code(findings)}, "findings": [\n  {lines}\n]}}'


def print_findings(findings: Sequence[Finding], console: Console, least: Level = Level.OK) -> None:
    """Prints a table of all from a level on, worst first, and the verdict.

    Where a terminal is too narrow for columns, it has one line after the other.
    """
    if not console.is_terminal:
        console.width = _ENDLESS
    ordered = worst_first(finding for finding in findings if finding.level >= least)
    if console.width < _NARROW:
        for finding in ordered:
            console.print(Text(finding.line(), _STYLES[finding.level]))
    elif ordered:
        console.print(_table(ordered))
    console.print(Text(summary_line(findings), "bold"))


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("", "check", "where", "found", "expected", "what to do"):
        table.add_column(name, no_wrap=name in ("", "check"))
    for finding in findings:
        cells = (finding.check, finding.where, finding.found, finding.expected, finding.advice)
        table.add_row(Text(str(finding.level), _STYLES[finding.level]), *map(Text, cells))
    return table


def abbreviate(names: Sequence[str]) -> str:
    """`node1, node2, node3, node4 and 60 more`."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
