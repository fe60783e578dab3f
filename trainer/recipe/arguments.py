"""Types of command line arguments."""

import argparse
from collections.abc import Callable

from mixmae.trainer.recipe.units import parse_size


def at_least(low: int) -> Callable[[str], int]:
    """An argument's type: a whole number not below `low`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number, {low} or more")
        return int(text)

    return number


def share(text: str) -> float:
    """An argument's type: a number above 0, and not above 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0 and not above 1")
    return value


def size(text: str) -> int:
    """An argument's type: bytes, such as 110KB."""
    try:
        return int(str(parse_size(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, {error}") from error
