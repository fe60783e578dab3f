"""A wall clock offset on one host, by a preloaded library (LD_PRELOAD)."""

from pathlib import Path

from tests.cluster import slurm, ssh
from tests.cluster.host import Host
from tests.cluster.namespaces import run_checked

_SOURCE = Path(__file__).with_name("wall_clock.c")
COMPILER = "cc"


def set_offset(host: Host, offset: float) -> None:
    """Shifts the wall clock by `offset` seconds for processes that ssh and Slurm start on this host from now on.

    Daemons keep the true time. The monotonic clock and timeouts are unaffected.
    """
    library = host.logs / "wall_clock.so"
    if not library.exists():
        run_checked([COMPILER, "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)])
    _apply(host, {"LD_PRELOAD": str(library), "WALL_CLOCK_OFFSET": f"{offset:f}"})


def clear_offset(host: Host) -> None:
    """Removes the offset for processes started on this host from now on."""
    _apply(host, {})


def _apply(host: Host, variables: dict[str, str]) -> None:
    ssh.set_environment(host, variables)
    slurm.set_environment(host, variables)
