"""Free TCP ports of this machine: to meet on at once, to give to a server, to reserve for somebody else."""

import errno
import ipaddress
import socket
from collections.abc import Iterable

LOOPBACK = "127.0.0.1"
_TRIES = 100
_RESERVE_TRIES = 1000


class PortError(Exception):
    """No port is free, or an address is not of this host."""


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def free_port_from(first: int, taken: Iterable[int] = ()) -> int:
    """The first port of the loopback interface from `first` on that nothing listens on, and that is not in `taken`.

    Raises:
        PortError: none of 100 ports is free.
    """
    last = min(first + _TRIES, 2**16)
    for port in range(first, last):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, after one that just ended
            try:
                probe.bind((LOOPBACK, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                continue
        if port not in taken:
            return port
    raise PortError(f"none of the ports {first} to {last - 1} is free; name another one")


def listening_address(name: str) -> str:
    """What a server listens on that other hosts reach by a name or address of this host: that address and no other.

    Where this host resolves its own name to its loopback interface, others know an address that it does not: then it is
    all of them, `::` or `0.0.0.0`.

    Raises:
        PortError: the name is unknown.
    """
    try:
        family, _, _, _, (address, *_) = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise PortError(f"the master address {name} is not known on its own host: {error.strerror}") from error
    if ipaddress.ip_address(str(address).partition("%")[0]).is_loopback and name not in ("localhost", address):
        return "::" if family == socket.AF_INET6 else "0.0.0.0"
    return str(address)


def is_loopback(name: str) -> bool:
    """Whether an address, or `localhost`, means this machine alone, on whatever machine."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def reserve_port(first: int) -> socket.socket:
    """A socket that keeps the first free port of all interfaces from `first` on for torch's rendezvous.

    It is bound alone and allows sharing only afterwards: no other reservation gets the port, but torch, which binds
    with SO_REUSEADDR, can listen on it.

    Raises:
        PortError: none of 1000 ports is free.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    for port in range(first, min(first + _RESERVE_TRIES, 2**16)):
        reserved = socket.socket(family, socket.SOCK_STREAM)
        if family == socket.AF_INET6:
            reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            reserved.bind(("", port))
        except OSError as error:
            reserved.close()
            if error.errno != errno.EADDRINUSE:
                raise PortError(f"cannot bind to port {port}: {error.strerror}") from error
            continue
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return reserved
    raise PortError(f"no port from {first} on is free")
