"""A host's network interfaces, and connection tests between hosts."""

import socket
from pathlib import Path
from typing import Self

import psutil

from mixmae.trainer.doctor.facts import Interface
from mixmae.trainer.engine.interfaces import interface_name

_SECONDS = 5.0
"""Connection timeout."""
_BITS_OF_RATE = 1e9 / 8
FABRIC = Path("/sys/class/infiniband")


def interface_with(address: str) -> Interface | None:
    """The interface that has this address, with the nominal speed that its driver reports."""
    if (name := interface_name(address)) is None:
        return None
    stats = psutil.net_if_stats()
    speed = stats[name].speed * 1e6 / 8 if name in stats else 0.0
    return Interface(name, address, speed or None)


def fabric_rate(folder: Path = FABRIC) -> float | None:
    """Total rate of all active InfiniBand and RoCE ports in bytes per second; None without any."""
    ports = [port for port in folder.glob("*/ports/*") if "ACTIVE" in (port / "state").read_text()]
    rates = [float((port / "rate").read_text().split()[0]) for port in ports]
    return sum(rates) * _BITS_OF_RATE if rates else None


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
    """A listening port for the connection test of another host; the kernel accepts connections.

    Args:
        address: at which others are told to connect.
        bind: what it listens on, if that is another.
    """

    def __init__(self, address: str, bind: str | None = None) -> None:
        bind = bind or address
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.bind((bind, 0))
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
