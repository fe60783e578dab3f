import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mixmae.trainer.doctor.protocol.findings import (
    Finding,
    Level,
    abbreviate,
    as_document,
    exit_code,
    finding_of,
    print_findings,
    summary_line,
    worst_first,
)

FINE = Finding(Level.OK, "clock", "all 2 hosts", "within 0.3 ms")
LATE = Finding(Level.WARNING, "clock", "node2", "42.0 s behind", "within 1 s", "start a time service")
FULL = Finding(Level.ERROR, "disk space", "node1", "1 GiB free", "3 GiB", "make room " * 40)
WORDS = st.text(min_size=1)


def printed(findings: list[Finding], width: int, terminal: bool) -> str:
    out = io.StringIO()
    print_findings(findings, Console(file=out, width=width, force_terminal=terminal, color_system=None))
    return out.getvalue()


@given(st.builds(Finding, st.sampled_from(Level), WORDS, WORDS, WORDS, WORDS, WORDS))
def test_findings_travel_as_json(finding: Finding) -> None:
    line = finding.to_json()
    assert "\n" not in line
    assert finding_of(json.loads(line)) == finding


def test_errors_alone_make_the_exit_code() -> None:
    assert exit_code([]) == exit_code([FINE, LATE]) == 0
    assert exit_code([FINE, FULL, LATE]) == 1


def test_the_worst_comes_first_and_order_stays_within_a_level() -> None:
    other = Finding(Level.OK, "cores", "node1", "64")
    assert worst_first([FINE, other, FULL, LATE]) == [FULL, LATE, FINE, other]


def test_what_goes_to_a_file_has_one_line_for_each() -> None:
    lines = printed([FINE, FULL, LATE], 80, terminal=False).splitlines()
    assert len(lines) == 1 + 3 + 1
    assert lines[1].split()[:3] == ["error", "disk", "space"]
    assert FULL.advice.strip() in lines[1]
    assert lines[-1] == "not ready: 1 error, 1 warning in 3 findings"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_terminals_show_everything_within_their_width(width: int) -> None:
    text = printed([FINE, FULL, LATE], width, terminal=True)
    assert max(map(len, text.splitlines())) <= width
    for word in ("42.0", "behind", "time", "service", "error", "warning"):
        assert word in text
    levels = [line.split(" ")[0] for line in text.splitlines()]
    assert [level for level in levels if level in ("error", "warning", "ok")] == ["error", "warning", "ok"]
    assert all(line.startswith(("error", "warning", "ok", " ", "not ready")) for line in text.splitlines())


def test_names_from_elsewhere_are_not_taken_for_markup() -> None:
    assert "[red]x[/red]" in printed([Finding(Level.OK, "a", "[red]x[/red]", "b")], 200, terminal=True)


def test_a_document_holds_all_of_it() -> None:
    document = json.loads(as_document([FINE, FULL]))
    assert document["exit_code"] == 1
    assert [finding["level"] for finding in document["findings"]] == ["error", "ok"]
    assert json.loads(as_document([])) == {"exit_code": 0, "findings": []}


def test_verdicts() -> None:
    assert summary_line([FINE, LATE, LATE]) == "ready: 0 errors, 2 warnings in 3 findings"


def test_long_lists_of_names_are_cut() -> None:
    assert abbreviate(["a", "b", "c", "d"]) == "a, b, c, d"
    assert abbreviate(["a", "b", "c", "d", "e"]) == "a, b, c, d and 1 more"


def test_warnings_without_advice_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        Finding(Level.WARNING, "clock", "node1", "off")
