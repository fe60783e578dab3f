"""Findings of the checks, printed as a table, lines or JSON, and their exit code. No torch."""

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

_NARROW, _UNWRAPPED = 140, 10_000
"""Columns that a table needs on a terminal; and width of non-terminal output, where lines are not wrapped."""
_NARROW_CHECK = 16
_SHOWN = 4


class Level(IntEnum):
    """Severity of a finding. Warnings do not stop a run from starting; errors do."""

    OK = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()


_STYLES = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "bold yellow", Level.ERROR: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        check: name of the check.
        where: host, rank or file, or the number of hosts.
        found: the value found.
        expected: the expected value; may be empty.
        advice: how to fix it; never empty in a warning or an error.
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

    def describe(self) -> str:
        """The finding without level and check, as one sentence."""
        where = f"{self.where}: " if self.where else ""
        expected = f", expected {self.expected}" if self.expected else ""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{where}{self.found}{expected}{advice}"

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"level": str(self.level)})


def finding_of(fields: Mapping[str, Any]) -> Finding:
    """Parses a finding from the fields of `Finding.to_json`.

    Raises:
        KeyError, TypeError: the fields are not those of a finding.
    """
    return Finding(**{**fields, "level": Level[str(fields["level"]).upper()]})


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sorts by level, most severe first; stable within a level."""
    return sorted(findings, key=lambda finding: -finding.level)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if there is an error, else 0."""
    return FAILED if any(finding.level is Level.ERROR for finding in findings) else FINISHED


def summary_line(findings: Sequence[Finding]) -> str:
    """The last line of a report, with the number of errors and warnings."""
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    named = [f"{counts[level]} {level}{'s'[: counts[level] != 1]}" for level in (Level.ERROR, Level.WARNING)]
    state = "not ready" if counts[Level.ERROR] else "ready"
    return f"{state}: {', '.join(named)} in {len(findings)} findings"


def as_document(findings: Sequence[Finding]) -> str:
    """All findings as one JSON document."""
    lines = ",\n  ".join(finding.to_json() for finding in worst_first(findings))
    return f'{{"exit_code": {exit_code(findings)}, "findings": [\n  {lines}\n]}}'


def print_findings(findings: Sequence[Finding], console: Console, least: Level = Level.OK) -> None:
    """Prints a table of the findings from a level on, most severe first, and the summary; wrapped on a terminal."""
    if not console.is_terminal:
        console.width = _UNWRAPPED
    ordered = worst_first(finding for finding in findings if finding.level >= least)
    if ordered:
        console.print(_narrow_table(ordered) if console.width < _NARROW else _table(ordered))
    console.print(Text(summary_line(findings), "bold"))


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("", "check", "where", "found", "expected", "what to do"):
        table.add_column(name, no_wrap=name in ("", "check"))
    for finding in findings:
        cells = (finding.check, finding.where, finding.found, finding.expected, finding.advice)
        table.add_row(Text(str(finding.level), _STYLES[finding.level]), *map(Text, cells))
    return table


def _narrow_table(findings: Sequence[Finding]) -> Table:
    """Level and check, and beside them all else as text."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(max_width=_NARROW_CHECK)
    table.add_column(ratio=1, overflow="fold")
    for finding in findings:
        cells = Text(finding.check), Text(finding.describe())
        table.add_row(Text(str(finding.level), _STYLES[finding.level]), *cells)
    return table


def abbreviate(names: Sequence[str]) -> str:
    """`node1, node2, node3, node4 and 60 more`."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
