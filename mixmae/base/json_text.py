"""JSON that somebody else may have written, or a full disk have cut."""

import json
from collections import Counter
from typing import Any


def parse_json(text: str | bytes, unique_keys: bool = False) -> Any:
    """As `json.loads`, for which text that is nested too deeply is wrong like any other.

    Raises:
        ValueError: no JSON, or, with `unique_keys`, an object with a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found
