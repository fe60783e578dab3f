"""Records outlive whatever happens to a line: a killed writer, a full disk, damage in the middle of the file."""

import json
import logging
import math
from pathlib import Path

import pytest

from mixmae.base import jsonl
from mixmae.base.jsonl import JsonLines
from tests.base.test_files import full_disk

DAMAGED = {
    "binary": b"\x84\xff\x00\n",
    "two lines mixed": b'{"n": 1, "t{"n": 2}\n',
    "cut short": b'{"n": 1, "te\n',
    "no object": b"[1]\n",
    "no key": b'{"other": 1}\n',
    "nested without end": b"[" * 100_000 + b"\n",
    "another encoding": '{"n": "ä"}\n'.encode("latin-1"),
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_costs_itself_alone_and_is_told(
    tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "records.jsonl"
    file.write_bytes(b'{"n": 1}\n' + damaged + b'{"n": 2}\n')
    with caplog.at_level(logging.WARNING):
        assert jsonl.read(file, "n") == [{"n": 1}, {"n": 2}]
    assert caplog.messages == [f"{file}: 1 of 3 lines cannot be read and are left out, the first is line 2"]


def test_whole_files_are_read_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert jsonl.read(tmp_path / "nothing") == []
    (tmp_path / "records").write_text('\n{"n": 1, "text": "\\u2028\u2028"}\n\n{"n": 2}')
    assert [record["n"] for record in jsonl.read(tmp_path / "records", "n")] == [1, 2]
    assert caplog.messages == []


@pytest.mark.parametrize("left", [b"", b'{"n": 1}\n', b'{"n": 1}\n{"n"', b'{"n": 1}'])
def test_what_a_killed_writer_left_of_a_line_harms_no_other(tmp_path: Path, left: bytes) -> None:
    file = tmp_path / "folder" / "records.jsonl"
    file.parent.mkdir()
    file.write_bytes(left)
    jsonl.append(file, {"n": 2}, {"n": 3})
    assert [record["n"] for record in jsonl.read(file)][-2:] == [2, 3]
    assert file.read_bytes().startswith(left)
    assert file.read_bytes().count(b"\n\n") == 0


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    jsonl.append(tmp_path / "new" / "records", {"a": math.nan, "b": {"c": [math.inf, 1.5]}})
    assert json.loads((tmp_path / "new" / "records").read_text()) == {"a": None, "b": {"c": [None, 1.5]}}


@pytest.mark.parametrize("room", [0, 1, 20])
@pytest.mark.parametrize("max_waiting_bytes", [0, 1000])
def test_a_full_disk_drops_lines_or_makes_them_wait(tmp_path: Path, room: int, max_waiting_bytes: int) -> None:
    lines = JsonLines(tmp_path / "records", max_waiting_bytes)
    lines.write({"n": 1})
    with full_disk((tmp_path / "records").stat().st_size + room):
        for number in range(2, 6):
            try:
                lines.write({"n": number, "text": "x" * 20})
            except OSError:
                assert not max_waiting_bytes
    lines.write({"n": 6})
    lines.close()
    expected = [1, 2, 3, 4, 5, 6] if max_waiting_bytes else [1, 6]
    assert [record["n"] for record in jsonl.read(tmp_path / "records")] == expected


def test_too_much_that_waits_is_an_error_and_still_not_lost(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "records", max_waiting_bytes=20)
    with full_disk(3):
        lines.write({"n": 1})
        with pytest.raises(OSError, match=rf"(No space.*|File too large): '{tmp_path}/"):
            lines.write({"n": 2, "text": "x" * 20})
    lines.close()
    assert [record["n"] for record in jsonl.read(tmp_path / "records")] == [1, 2]
