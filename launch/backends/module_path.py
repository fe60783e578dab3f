"""Where Python looks for modules in ranks: not in the working directory, whose files may be called like its own.

`python -m`, by which DeepSpeed's launcher and ranks are started, would look there first: a user's `token.py` or
`queue.py` would take the place of Python's.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

_SAFE = {"PYTHONSAFEPATH": "1"}


def module_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that say so to Python on this and other hosts.

    Args:
        environment: with the user's own PYTHONPATH.
    """
    path = os.pathsep.join(filter(None, [*_checkout(), environment.get("PYTHONPATH")]))
    return {**_SAFE, **({"PYTHONPATH": path} if path else {})}


def module_path_in_shell() -> str:
    """The same before a command line, or after `export`, in a shell whose own PYTHONPATH stays."""
    paths = [f"PYTHONPATH={shlex.quote(here)}${{PYTHONPATH:+:$PYTHONPATH}}" for here in _checkout()]
    return " ".join([*(f"{name}={value}" for name, value in _SAFE.items()), *paths])


def _checkout() -> list[str]:
    """The working directory, if this package is imported from there: a checkout, which may not be installed."""
    here = Path.cwd()
    return [str(here)] if Path(__file__).resolve().parents[2] == here else []
