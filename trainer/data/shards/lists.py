"""Lists of images: CSV files with a header (`path`, perhaps `label`) and JSON lines with the same two names, where a
label may be a list of class names.

`metadata.csv` and `metadata.jsonl` of the Hugging Face hub are such lists too: they say `file_name`, and may have
further columns, which are told and left out.
"""

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import NamedTuple

from mixmae.base.errors import UsageError
from mixmae.base.json_text import parse_json
from mixmae.trainer.data.index import UNLABELLED
from mixmae.trainer.data.shards.labels import is_class_name, join_classes, looks_like_a_number

_COLUMNS = ("path", "label")
_NAMES = {"file_name": "path"}
"""Of the Hugging Face hub."""
_MOST = 2**31


class Item(NamedTuple):
    """A line of a list."""

    line: int
    path: str
    label: int
    """`UNLABELLED` without one."""


class _Line(NamedTuple):
    number: int
    path: str
    label: str | None


def read_list(file: Path) -> tuple[list[Item], list[str]]:
    """The lines of a list, and its class names.

    Labels that are whole numbers are taken as they are and have no names; other labels are class names, which become
    0, 1, ... in sorted order. A line without a label, or with -1, is unlabelled.

    Raises:
        UsageError: a line that cannot be read, an unknown column, no lines, or labels of several kinds.
    """
    try:
        lines = list(_csv_lines(file) if file.suffix.lower() == ".csv" else _json_lines(file))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UsageError(f"{file} is not UTF-8 text (it has a byte {byte:#04x}); save it as UTF-8") from error
    if not lines:
        raise UsageError(f"{file} lists no images; expected one a line")
    labels, classes = _number_labels(file, lines)
    return [Item(line.number, line.path, label) for line, label in zip(lines, labels, strict=True)], classes


def _csv_lines(file: Path) -> Iterator[_Line]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            columns = [_NAMES.get(name, name) for name in reader.fieldnames or []]
            reader.fieldnames = columns
            others = _others(file, columns)
            if "path" not in columns or set(columns) - {*_COLUMNS, *others} or len(set(columns)) < len(columns):
                raise UsageError(
                    f"{file}, line 1: columns {', '.join(columns)!r}; expected a header 'path' or 'path,label'"
                )
            for row in reader:
                if None in row or None in row.values():
                    raise UsageError(
                        f"{file}, line {reader.line_num}: expected {len(columns)} fields, as its header has"
                    )
                yield _line(file, reader.line_num, row)
            _tell_others(file, others)
        except csv.Error as error:
            raise UsageError(f"{file}, line {reader.reader.line_num}: {error}") from error


def _json_lines(file: Path) -> Iterator[_Line]:
    others: set[str] = set()
    with file.open(encoding="utf-8-sig") as stream:
        for number, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                content = parse_json(text, unique_keys=True)
            except ValueError as error:
                raise UsageError(f"{file}, line {number}: not JSON: {error}") from error
            if isinstance(content, dict):
                content = {_NAMES.get(name, name): value for name, value in content.items()}
                others |= _others(file, content)
            if not isinstance(content, dict) or "path" not in content or set(content) - {*_COLUMNS, *others}:
                raise UsageError(
                    f'{file}, line {number}: expected {{"path": ..., "label": ...}}, got {text.strip()[:80]}'
                )
            yield _line(file, number, content)
    _tell_others(file, others)


def _others(file: Path, columns: Iterable[str]) -> set[str]:
    """What the hub's lists have beside images and labels; nothing else may have more."""
    return set(columns) - set(_COLUMNS) if file.stem == "metadata" else set()


def _tell_others(file: Path, others: set[str]) -> None:
    if others:
        print(f"not used: columns of {file}: {', '.join(sorted(others))}", file=sys.stderr)


def _line(file: Path, number: int, content: dict[str, object]) -> _Line:
    path, label = content["path"], content.get("label")
    if not isinstance(path, str) or not path:
        raise UsageError(f"{file}, line {number}: path {path!r}; expected the name of a file")
    if isinstance(label, list):
        label = join_classes(label) or label
    if isinstance(label, bool) or not isinstance(label, (str, int, float, NoneType)):
        raise UsageError(
            f"{file}, line {number}: label {content['label']!r}; expected a class name, a whole number, or a list of "
            "names without commas"
        )
    text = "" if label is None else str(label).strip()  # as of .cls files
    return _Line(number, path, text or None)


def _number_labels(file: Path, lines: list[_Line]) -> tuple[list[int], list[str]]:
    """Labels as numbers, and the names of the numbers."""
    labelled = [line for line in lines if line.label not in (None, str(UNLABELLED))]
    kinds = ["a number" if looks_like_a_number(str(line.label)) else "a name" for line in labelled]
    for line, kind in zip(labelled, kinds, strict=True):
        if kind != kinds[0]:
            raise UsageError(
                f"{file}, line {line.number} has {kind} ({line.label}), line {labelled[0].number} has {kinds[0]}; "
                "label all lines by numbers or all by names"
            )
    if kinds[:1] == ["a name"]:
        for line in labelled:
            if not is_class_name(str(line.label)):
                raise UsageError(
                    f"{file}, line {line.number}: label {str(line.label)[:80]!r}; expected at most 200 printable "
                    "characters"
                )
        classes = sorted({str(line.label) for line in labelled})
        numbers = {name: number for number, name in enumerate(classes)}
        return [UNLABELLED if line.label is None else numbers.get(line.label, UNLABELLED) for line in lines], classes
    for line in labelled:
        text = str(line.label)
        if not (text.isascii() and text.isdigit()) or int(text) >= _MOST:
            raise UsageError(f"{file}, line {line.number}: label {text}; expected a whole number, 0 or more, or -1")
    return [UNLABELLED if line.label is None else int(line.label) for line in lines], []
