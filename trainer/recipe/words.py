"""What is wrong with a recipe in words: pydantic's findings without its types, values as YAML writes them."""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

_LONGEST = 80
"""Characters of a value that a message shows."""
_EXPECTED = {
    "model_type": "expected keys and values below it",
    "model_attributes_type": "expected keys and values below it",
    "dict_type": "expected keys and values below it",
    "mapping_type": "expected keys and values below it",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "sequence_str": "expected a list",
    "is_instance_of": "expected a list",
    "string_type": "expected text",
    "path_type": "expected a path",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_parsing_size": "expected a smaller number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "missing": "is missing",
}
_UNION_MEMBER = re.compile(r"int|float|str|bool|\W.*|.*[\[\]()].*|(?:function|constrained|lax|nullable)-.*")
"""Parts of pydantic's locations that are no keys."""


def explain(error: ValidationError, schema: type[BaseModel], section: str = "") -> str:
    """The first few findings, each a sentence; an unknown key with the nearest one that the schema has.

    Args:
        section: of the recipe that the schema is for, where it is not for all of it.
    """
    sentences: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        subject, expected = _finding(detail, schema, section)
        if expected not in sentences.setdefault(subject, []):
            sentences[subject].append(expected)
    parts = [f"{subject}{', or '.join(expected)}" for subject, expected in sentences.items()]
    return "; ".join(parts[:3])


def shown(value: Any) -> str:
    """A value as YAML would have it, cut where it is long."""
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST else f"{value[:_LONGEST]}...")
    text = "".join(_pieces(value, 0))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _pieces(value: Any, depth: int) -> Iterator[str]:
    """A value's text, of which no more is made than is shown."""
    if depth > 3:
        yield "..."
    elif isinstance(value, Mapping):
        items = list(value.items())[: _LONGEST // 4]
        yield "{" + ", ".join(f"{_key(key)}: {''.join(_pieces(item, depth + 1))}" for key, item in items) + "}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield "[" + ", ".join("".join(_pieces(item, depth + 1)) for item in value[: _LONGEST // 4]) + "]"
    elif isinstance(value, float) and not math.isfinite(value):
        yield ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * _LONGEST:
        yield f"a number of {value.bit_length()} bits"
    elif isinstance(value, bool | int | float | str) or value is None:
        yield json.dumps(value, ensure_ascii=False)
    else:
        yield str(value)


def _key(key: object) -> str:
    return json.dumps(str(key), ensure_ascii=False)[1:-1]


def _finding(detail: Any, schema: type[BaseModel], section: str) -> tuple[str, str]:
    """What is wrong: the key with its value, and what was expected."""
    keys = [str(part) for part in detail["loc"] if isinstance(part, int) or not _UNION_MEMBER.fullmatch(part)]
    path = ".".join([*([section] if section else []), *keys])
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"unknown key {shown(path)}", nearest_key(path, schema, section)
    if kind == "value_error":
        expected = detail["msg"].removeprefix("Value error, ")
    elif kind in ("too_long", "too_short"):
        bounds = detail["ctx"]
        most_or_least = f"at most {bounds['max_length']}" if kind == "too_long" else f"{bounds['min_length']} or more"
        expected = f"expected {most_or_least} values, got {bounds['actual_length']}"
    else:
        expected = (
            _EXPECTED.get(kind)
            or f"expected {detail['msg'].removeprefix('Input should be ').replace('True or False', 'true or false')}"
        )
    value = f"={shown(given)}" if not isinstance(given, BaseModel | Mapping) and kind != "missing" else ""
    return (f"{path}{value}: " if path else ""), expected


def nearest_key(path: str, schema: type[BaseModel], section: str = "") -> str:
    """The known key that a wrong one stands for, or all of them."""
    prefix = f"{section}." if section else ""
    known, wanted = list(_paths(schema)), path.removeprefix(prefix)
    by_leaf = [k for k in known if k.rsplit(".", 1)[-1] == wanted.rsplit(".", 1)[-1]]
    nearest = by_leaf or difflib.get_close_matches(wanted[:_LONGEST], known, n=1, cutoff=0.6)
    return f"; did you mean {prefix + nearest[0]!r}?" if nearest else f"; known: {', '.join(schema.model_fields)}"


def _paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{prefix}{name}.")
