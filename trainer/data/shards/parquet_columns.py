"""The columns of Parquet files: images, labels, and what is not used."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixmae.base.errors import UsageError
from mixmae.trainer.data.index import UNLABELLED
from mixmae.trainer.data.shards.labels import is_class_name, join_classes

_LABEL = "label"
_BINARY_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")


class Columns(NamedTuple):
    """What the columns of a Parquet file are."""

    image: str
    label: str | None
    names: list[str] | None
    """Of the labels 0, 1, ..."""
    unused: list[str]

    def __str__(self) -> str:
        labels = "no labels" if self.label is None else f"labels {self.label}"
        return f"images {self.image} and {labels}{f' of {len(self.names)} classes' if self.names else ''}"


def find_columns(file: Path, schema: Any, label: str | None) -> Columns:
    """
    Args:
        label: column of the labels; None: `label`, or the only ClassLabel.

    Raises:
        UsageError: not one column of images; several of labels, or none of that name.
    """
    import pyarrow as pa

    features = _features(schema)

    def holds_images(field: Any) -> bool:
        if features.get(field.name, {}).get("_type") == "Image":
            return True
        if pa.types.is_struct(field.type):
            return "bytes" in [inner.name for inner in field.type]
        return pa.types.is_binary(field.type) and field.name.lower() in _BINARY_NAMES

    images = [field.name for field in schema if holds_images(field)]
    if len(images) != 1:
        raise UsageError(
            f"{file} has {len(images)} columns of images among {', '.join(schema.names)}; expected one, a struct of "
            "bytes and path"
        )
    items = {name: one.get("feature", one) for name, one in features.items()}  # of a list: what it holds
    classes = {name: one.get("names") for name, one in items.items() if one.get("_type") == "ClassLabel"}
    if label is None and _LABEL not in schema.names and len(classes) > 1:
        raise UsageError(
            f"{file} has {len(classes)} columns of labels, {', '.join(classes)}; name one: --label-column "
            f"{next(iter(classes))}"
        )
    if label is not None and label not in schema.names:
        raise UsageError(f"--label-column {label}: {file} has the columns {', '.join(schema.names)}")
    label = label or (_LABEL if _LABEL in schema.names else next(iter(classes), None))
    names = classes.get(label) if label is not None else None
    return Columns(images[0], label, names, [name for name in schema.names if name not in (images[0], label)])


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the `datasets` library says of the columns; nothing where it did not write the file."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: one for name, one in features.items() if isinstance(one, dict)}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


def number_labels(file: Path, columns: Columns, labels: list[Any]) -> tuple[list[int], list[str]]:
    """Labels as numbers, and the names of the numbers.

    Raises:
        UsageError: they are neither all names, nor all class numbers, nor all lists of classes with names.
    """
    column, names = columns.label, columns.names
    kinds = {type(label) for label in labels if label is not None}
    if kinds == {list}:
        labels, kinds = [None if label is None else _joined(file, columns, label) for label in labels], {str}
    if kinds <= {str} and kinds:
        classes = sorted(set(labels) - {None})
        if bad := [name for name in classes if not is_class_name(name)]:
            raise UsageError(f"{file}: {column} is {bad[0][:80]!r}; expected at most 200 printable characters")
        numbers = {name: number for number, name in enumerate(classes)}
        return [UNLABELLED if label is None else numbers[label] for label in labels], classes
    if not kinds <= {int}:
        raise UsageError(
            f"{file}: {column} holds values of the kind {', '.join(sorted(kind.__name__ for kind in kinds))}; expected "
            "whole numbers or names"
        )
    found = np.array([UNLABELLED if label is None else label for label in labels], dtype=np.int64)
    bound = len(names) if names else 2**31
    if len(found) and not UNLABELLED <= found.min() <= found.max() < bound:
        raise UsageError(f"{file}: {column} has values from {found.min()} to {found.max()}; expected 0 to {bound - 1}")
    return found.tolist(), list(names or [])


def _joined(file: Path, columns: Columns, label: list[Any]) -> str:
    """Several classes of an image as one label."""
    names = columns.names or []
    words = [names[one] if isinstance(one, int) and 0 <= one < len(names) else one for one in label]
    if (joined := join_classes(words)) is None:
        raise UsageError(
            f"{file}: {columns.label} is {str(label)[:80]}; expected a list of class names without commas, or of the "
            "numbers of a ClassLabel"
        )
    return joined
