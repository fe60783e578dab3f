"""Types of command line arguments."""

import argparse
from collections.abc import Callable


def at_least(low: int) -> Callable[[str], int]:
    """An argument's type: a whole number not below `low`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number, {low} or more")
        return int(text)

    return number
