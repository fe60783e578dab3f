"""Slurm's lists of nodes, such as `node[01-03,7],login`, without `scontrol`, which not every node has."""

import itertools
import re
from collections.abc import Iterator

_PART = re.compile(r"(?:[^,\[\]]|\[[^\]]*\])+")
_BRACKETS = re.compile(r"\[([^\]]*)\]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST = 100_000


def expand(hosts: str) -> list[str]:
    """The names of a list, in its order.

    Raises:
        ValueError: not such a list.
    """
    found = [name for part in _PART.findall(hosts) for name in _names(part)]
    if not found or ",".join(_PART.findall(hosts)) != hosts:
        raise ValueError(f"{hosts!r} is no list of nodes; expected such as node[01-16]")
    return found


def _names(part: str) -> Iterator[str]:
    fixed, ranges = _BRACKETS.split(part)[::2], _BRACKETS.findall(part)
    for numbers in itertools.product(*map(_numbers, ranges)):
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(fixed, numbers, fillvalue="")))


def _numbers(ranges: str) -> list[str]:
    found: list[str] = []
    for text in ranges.split(","):
        match = _RANGE.fullmatch(text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or not 0 <= last - first < _MOST:
            raise ValueError(f"[{ranges}]: expected numbers and ranges, such as [01-16,20]")
        found += [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return found
