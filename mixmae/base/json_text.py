"""JSON that somebody else may have written, or a full disk have cut."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, for which text that is nested too deeply is wrong like any other.

    Raises:
        ValueError: no JSON.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
