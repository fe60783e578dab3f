"""A host's network interfaces, and connection tests between hosts."""

import socket
from pathlib import Path
from typing import Self

import psutil

from mixmae.trainer.doctor.facts import Interface

_SECONDS = 5.0
"""Connection timeout."""
_BITS_OF_RATE = 1e9 / 8
FABRIC = Path("/sys/class/infiniband")


def address_towards(host: str) -> str:
    """This host's address on the route to another host; sends no packet."""
    family, kind, protocol, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(there)
        return str(probe.getsockname()[0])


def interface_with(address: str) -> Interface | None:
    """The interface that has this address, with the nominal speed that its driver reports."""
    stats = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        if address in (one.address.partition("%")[0] for one in addresses):
            speed = stats[name].speed * 1e6 / 8 if name in stats else 0.0
            return Interface(name, address, speed or None)
    return None


def fabric_rate(folder: Path = FABRIC) -> float | None:
    """Total rate of all active InfiniBand and RoCE ports in bytes per second; None without any."""
    ports = [port for port in folder.glob("*/ports/*") if "ACTIVE" in (port / "state").read_text()]
    rates = [float((port / "rate").read_text().split()[0]) for port in ports]
    return sum(rates) * _BITS_OF_RATE if rates else None


def own_addresses() -> tuple[str, ...]:
    """Addresses that this host's name resolves to on this host; empty if it does not resolve."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_free(port: int) -> bool:
    """Whether a port of the loopback interface is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Listener:
    """A listening port for the connection test of another host; the kernel accepts connections."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.bind((address, 0))
        self._socket.listen(64)
        self.at: tuple[str, int] = (address, self._socket.getsockname()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def why_unreachable(address: str, port: int) -> str:
    """Why a port cannot be reached; empty if it can."""
    try:
        with socket.create_connection((address, port), _SECONDS):
            return ""
    except OSError as error:
        return f"{address} port {port}: {error.strerror or error}"
