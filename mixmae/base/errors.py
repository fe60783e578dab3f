"""Errors of the user: one clear line and exit code 2, never a traceback."""

import os
import sys
from collections.abc import Callable, Sequence

ERROR = "mixmae: error: "
"""How the line begins that says what went wrong."""
_INTERRUPTED = 130
"""What a shell reports of a command that SIGINT ended."""


class UsageError(ValueError):
    """A wrong value from the user; the message gives the value, what was expected and what to change."""

    exit_code = 2


def run_cli(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command; a UsageError, or Ctrl-C, becomes one line on standard error and an exit code."""
    try:
        return main(argv)
    except UsageError as error:
        rank = os.environ.get("RANK", "0")
        print(f"{ERROR}{f'rank {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("mixmae: interrupted", file=sys.stderr, flush=True)
        return _INTERRUPTED
