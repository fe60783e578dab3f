"""Comparison of hosts: the most common value, and the hosts that differ from it."""

from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def most_common(values: Mapping[str, T]) -> T:
    """The value that most hosts have; of ties the first host's."""
    return Counter(values.values()).most_common(1)[0][0]


def outliers(values: Mapping[str, T]) -> dict[T, list[str]]:
    """Hosts by value, except those with the most common one."""
    usual = most_common(values)
    others: dict[T, list[str]] = {}
    for host, value in values.items():
        if value != usual:
            others.setdefault(value, []).append(host)
    return others


def describe_hosts(count: int) -> str:
    return "1 host" if count == 1 else f"all {count} hosts"
