"""Command line arguments that several commands take, and their types."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from mixmae.trainer.recipe.units import parse_size


def add_recipe(parser: argparse.ArgumentParser, optional: bool = False, without: str = "") -> None:
    """Adds RECIPE and its overrides; `without` says what an `optional` recipe's absence means."""
    help_text = "YAML file, or a name that 'mixmae recipes' lists, such as pretrain/swin_base_w14"
    if optional:
        parser.add_argument("recipe", type=Path, nargs="?", help=f"{help_text}; without one, {without}")
    else:
        parser.add_argument("recipe", type=Path, help=help_text)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.micro_batch=64")


def at_least(low: int) -> Callable[[str], int]:
    """An argument's type: a whole number not below `low`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number, {low} or more")
        return int(text)

    return number


def above_0(text: str) -> float:
    """An argument's type: a finite number above 0."""
    return _positive(text, sys.float_info.max, "a number above 0")


def share(text: str) -> float:
    """An argument's type: a number above 0, and not above 1."""
    return _positive(text, 1.0, "a number above 0 and not above 1")


def _positive(text: str, most: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= most:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return value


def size(text: str) -> int:
    """An argument's type: bytes, such as 110KB; at least one."""
    try:
        number = int(str(parse_size(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, {error}") from error
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected 1 byte or more")
    return number
