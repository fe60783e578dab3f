"""A host whose wall clock is off, by a small library that is loaded into what is started there."""

from pathlib import Path

from tests.cluster import slurm, ssh
from tests.cluster.host import Host
from tests.cluster.namespaces import run_checked

_SOURCE = Path(__file__).with_name("wall_clock.c")
COMPILER = "cc"


def set_off(host: Host, offset: float) -> None:
    """Shifts the clock of all that ssh and Slurm start on this host from now on; its daemons keep the right time.

    The monotonic clock stays right, and so does how long anything waits.
    """
    library = host.logs / "wall_clock.so"
    if not library.exists():
        run_checked([COMPILER, "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)])
    _apply(host, {"LD_PRELOAD": str(library), "WALL_CLOCK_OFFSET": f"{offset:f}"})


def set_right(host: Host) -> None:
    """What is started on this host from now on sees the right time again."""
    _apply(host, {})


def _apply(host: Host, variables: dict[str, str]) -> None:
    ssh.set_environment(host, variables)
    slurm.set_environment(host, variables)
