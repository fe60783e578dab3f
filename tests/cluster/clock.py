"""A host whose wall clock is off, by libfaketime in what is started there."""

from pathlib import Path

from tests.cluster import slurm, ssh
from tests.cluster.host import Host

PACKAGE = "libfaketime"


def library() -> Path | None:
    """libfaketime for programs with threads, where Debian installs it; None if it is not installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def environment(offset: float) -> dict[str, str]:
    """What a process needs in its environment to see the wall clock `offset` seconds ahead (behind if negative).

    The monotonic clock stays right, and so do timeouts.
    """
    path = library()
    assert path is not None, f"{PACKAGE} is not installed"
    return {"LD_PRELOAD": str(path), "FAKETIME": f"{offset:+f}s", "DONT_FAKE_MONOTONIC": "1"}


def set_off(host: Host, offset: float) -> None:
    """Shifts the clock of all that ssh and Slurm start on this host from now on; its daemons keep the right time."""
    _apply(host, environment(offset))


def set_right(host: Host) -> None:
    """What is started on this host from now on sees the right time again."""
    _apply(host, {})


def _apply(host: Host, variables: dict[str, str]) -> None:
    ssh.set_environment(host, variables)
    slurm.set_environment(host, variables)
