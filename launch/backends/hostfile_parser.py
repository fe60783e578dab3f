"""Reads hostfiles before DeepSpeed does: what it would skip, guess or start fewer ranks for is refused."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_MOST_SLOTS = 4096
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class HostSlots:
    """Hosts in the order of their ranks, and the accelerators of each.

    Attributes:
        slots: accelerator numbers by host.
    """

    slots: dict[str, tuple[int, ...]]

    @property
    def ranks(self) -> int:
        return sum(map(len, self.slots.values()))

    @property
    def first(self) -> str:
        return next(iter(self.slots))


def read_hostfile(file: Path) -> HostSlots:
    """All hosts of a hostfile, `NAME slots=N` a line.

    Raises:
        UsageError: no such file, no host in it, a line that is not of this form, a host twice, no slots.
    """
    if not file.is_file():
        raise UsageError(f"hostfile {file} {what_is(file)}; expected a file with lines such as 'node1 slots=8'")
    slots: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(_text(file).splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        where = f"{file}, line {number}: {content!r}"
        match = _LINE.fullmatch(content)
        if match is None:
            raise UsageError(f"{where}: expected a host and its number of ranks, such as 'node1 slots=8'")
        name, count = match[1], int(match[2][:12])
        if not _NAME.fullmatch(name):
            raise UsageError(f"{where}: {name!r} is not a host's name; {_advice(name)}")
        if name in slots:
            raise UsageError(f"{where}: {name} is on an earlier line too; keep one line, with all its slots")
        if count > _MOST_SLOTS:
            raise UsageError(f"{where}: {match[2][:12]} slots; expected as many as the host has accelerators")
        if count == 0:
            raise UsageError(f"{where}: 0 slots; remove the line, or use --exclude {name}")
        slots[name] = tuple(range(count))
    if not slots:
        raise UsageError(f"hostfile {file} names no hosts; expected lines such as 'node1 slots=8'")
    return HostSlots(slots)


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"hostfile {file} cannot be read ({error}); expected text such as 'node1 slots=8'") from error


def _advice(name: str) -> str:
    """What to write instead of something that is close to a host's name."""
    user, at, host = name.rpartition("@")
    if at and _NAME.fullmatch(host):
        return f"write '{host}', and 'User {user}' below 'Host {host}' in ~/.ssh/config"
    if name.count(":") > 1 or name.startswith("["):
        return "pdsh takes no IPv6 addresses: name the host in /etc/hosts or DNS, and write that name"
    host, colon, port = name.partition(":")
    if colon and port.isdecimal():
        return f"write '{host}', and give the port of ssh with --ssh-port {port}"
    if "," in name or "[" in name:
        return "write each host on a line of its own"
    return "a name has letters, digits, dots and hyphens, such as node1.cluster"


def select(hosts: HostSlots, include: str, exclude: str) -> HostSlots:
    """The hosts and slots that DeepSpeed's `--include` and `--exclude` leave, `NAME[:SLOT,...][@NAME...]`.

    Raises:
        UsageError: both are given, a name or slot does not exist, or nothing is left.
    """
    if include and exclude:
        raise UsageError(f"--include {include} and --exclude {exclude} cannot be given together; use one")
    named = _parse("--include" if include else "--exclude", include or exclude, hosts)
    kept = {}
    for name, slots in hosts.slots.items():
        chosen = tuple(slot for slot in slots if (slot in named.get(name, ())) == bool(include))
        if chosen:
            kept[name] = chosen
    if not kept:
        raise UsageError(f"--exclude {exclude} leaves no host; exclude fewer")
    return HostSlots(kept)


def _parse(option: str, text: str, hosts: HostSlots) -> dict[str, set[int]]:
    named: dict[str, set[int]] = {}
    for part in text.split("@") if text else []:
        name, colon, numbers = part.partition(":")
        if name not in hosts.slots:
            raise UsageError(f"{option} {text}: the hostfile has no {name!r}; it has {_some(list(hosts.slots))}")
        if colon and not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise UsageError(f"{option} {text}: {part!r} is not of the form NAME or NAME:SLOT,SLOT, such as node1:0,2")
        slots = set(map(int, numbers.split(","))) if colon else set(hosts.slots[name])
        if missing := sorted(slots - set(hosts.slots[name])):
            raise UsageError(
                f"{option} {text}: {name} has no slot {missing[0]}; the hostfile gives it slots 0 to "
                f"{len(hosts.slots[name]) - 1}"
            )
        named.setdefault(name, set()).update(slots)
    return named


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
