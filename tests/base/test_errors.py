"""What a command prints reaches its reader, whatever the terminal and the disk behind it are."""

import errno
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mixmae.base.errors import run_cli, run_rank


def print_all(argv: Sequence[str]) -> int:
    for text in argv:
        print(text)
    return 0


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_name_that_a_terminal_cannot_show_is_shown_by_its_numbers(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's name may hold bytes that are no text at all."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    assert run_cli(print_all, ["caf\udce9", "\N{SNOWMAN}"]) == 0
    snowman = "\N{SNOWMAN}" if encoding == "utf-8" else r"\u2603"
    assert shown.getvalue().decode(encoding).splitlines() == [r"caf\udce9", snowman]


def test_a_full_disk_behind_a_redirection_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_cli(print_all, ["text"]) == 2
    assert capsys.readouterr().err == "mixmae: error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EEXIST, 2), (errno.ENOTDIR, 2), (errno.ENOSPC, 1), (errno.EACCES, 1), (errno.EROFS, 1)],
)
def test_a_file_in_a_ranks_way_is_one_line(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The start after one on a full disk may go well, the one after a file in a folder's place will not."""

    def fail(argv: Sequence[str]) -> int:
        raise OSError(number, "what is wrong", argv[0])

    monkeypatch.setenv("RANK", "3")
    assert run_rank(fail, ["run/claimed.json"]) == code
    assert capsys.readouterr().err == "mixmae: error: rank 3: run/claimed.json: what is wrong\n"


def test_what_only_a_bug_can_be_has_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_rank(lambda argv: 1 // len(argv), []) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
