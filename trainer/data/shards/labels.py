"""Labels of samples: class numbers, class names, or none. They never decide whether an image can be used."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mixmae.trainer.data.faults import has_control_characters
from mixmae.trainer.data.index import INVALID_LABEL, UNLABELLED, Table

_FIRST_NAME = INVALID_LABEL - 1
"""Code of the first class name of a shard; those of its further names are below it."""
_NUMBER = re.compile(r"[+-]?[0-9.]+")
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_LONGEST_NAME = 200
_SEPARATOR = ","
"""Of several classes in one label."""


class LabelCodes:
    """Numbers labels as the index does, and class names by codes of their own until those of all shards are known."""

    def __init__(self, classes: Sequence[str]) -> None:
        """
        Args:
            classes: names of the labels 0, 1, ... as far as they are known; numbers outside of them are invalid. None
                are known: any number is fine.
        """
        self._numbers = {name: number for number, name in enumerate(classes)}
        self._bound = len(classes) or 2**31
        self._codes: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """Class names that are not known, in the order of their codes."""
        return list(self._codes)

    def encode(self, text: bytes) -> int:
        """A label: its number, UNLABELLED for an empty text or -1, INVALID_LABEL, or the code of a class name."""
        try:
            name = text.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            return INVALID_LABEL
        if not name:
            return UNLABELLED
        if _WHOLE.fullmatch(name):
            number = int(name)
            return number if number == UNLABELLED or 0 <= number < self._bound else INVALID_LABEL
        if name in self._numbers:
            return self._numbers[name]
        if looks_like_a_number(name) or not is_class_name(name):
            return INVALID_LABEL
        return self._codes.setdefault(name, _FIRST_NAME - len(self._codes))


def join_classes(names: Sequence[object]) -> str | None:
    """Several classes of an image as one label, as `classification.multi_label` reads it; None: they are no names."""
    words = [name.strip() for name in names if isinstance(name, str) and _SEPARATOR not in name]
    if len(words) < len(names) or "" in words:
        return None
    return _SEPARATOR.join(words) + ("" if len(words) > 1 else _SEPARATOR)


def split_classes(label: str) -> list[str]:
    """The classes that a label names, as `join_classes` joins them."""
    return [name for part in label.split(_SEPARATOR) if (name := part.strip())]


def looks_like_a_number(label: str) -> bool:
    """Whether a label is meant as a number, whole or not. `1e3` and `nan` are names."""
    return _NUMBER.fullmatch(label) is not None


def is_class_name(name: str) -> bool:
    """Whether a text can name a class: it is shown in terminals and kept in files."""
    short = 0 < len(name) <= _LONGEST_NAME
    return short and not has_control_characters(name) and "".join(name.split()).isprintable()


def are_numbers(tables: Iterable[Table], classes: Sequence[str]) -> bool:
    """Whether labels are class numbers without names, among which a name is no class."""
    return not classes and any((table["label"] >= 0).any() for table in tables)


def is_name(labels: Any) -> Any:
    """Whether a label, or each of an array, is the code of a class name that was not known."""
    return labels <= _FIRST_NAME


def label_text(label: int, names: Sequence[str]) -> str:
    """A label for a reader: its number, or the class name that its code stands for."""
    return repr(names[_FIRST_NAME - label]) if is_name(label) else str(label)


def resolve_names(tables: Sequence[Table], names: Sequence[Sequence[str]], classes: Sequence[str]) -> list[str]:
    """Replaces the codes of class names in tables by class numbers, in place; returns all class names.

    New names get the numbers after those of `classes`, sorted. Where other labels are numbers and no classes are known,
    names are invalid: nothing says which numbers they are.

    Args:
        names: for each table the names that its codes stand for.
    """
    new = sorted({name for of_table in names for name in of_table} - set(classes))
    if not new:
        return list(classes)
    if are_numbers(tables, classes):
        for table in tables:
            table["label"][is_name(table["label"])] = INVALID_LABEL
        return []
    resolved = [*classes, *new]
    numbers = {name: number for number, name in enumerate(resolved)}
    for table, of_table in zip(tables, names, strict=True):
        codes = is_name(table["label"])
        table["label"][codes] = np.array([numbers[name] for name in of_table], dtype="<i4")[
            _FIRST_NAME - table["label"][codes]
        ]
    return resolved
