"""Ports on the first rank's host, so that two runs on one host never take each other's."""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Awaitable, Callable

from mixmae.launch.supervision.protocol import LONGEST, PORTS

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class PortError(Exception):
    """The first rank's host has no port, or not the address, that was asked for."""


async def listen(handler: Handler, address: str, first_port: int) -> tuple[asyncio.Server, int]:
    """Listens on the first free one of the lifeline's ports; returns it too.

    Raises:
        PortError: none is free, or the address is not of this host.
    """
    for port in range(first_port, first_port + PORTS):
        try:
            # Not shared: a port that another run reserved, see below, counts as taken.
            return await asyncio.start_server(handler, address, port, limit=LONGEST, reuse_address=False), port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise PortError(f"cannot listen on the master address {address}: {error.strerror}") from error
    raise PortError(f"ports {first_port} to {first_port + PORTS - 1} of {address} are all taken; set launch.port")


async def own_address(address: str) -> str:
    """What to listen on: the master address, or every one where this host's name means its loopback interface.

    Raises:
        PortError: the address is unknown.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise PortError(f"the master address {address} is not known on its own host: {error.strerror}") from error
    family, own = found[0][0], str(found[0][4][0])
    if ipaddress.ip_address(own).is_loopback and address not in ("localhost", own):
        return "::" if family == socket.AF_INET6 else "0.0.0.0"
    return own


def reserve(first_port: int) -> socket.socket:
    """A socket that keeps the first free port from `first_port` on for torch's rendezvous.

    It is bound alone and allows sharing only afterwards: no other reservation gets the port, but torch, which binds
    with SO_REUSEADDR, listens on it whenever it comes to that.

    Raises:
        PortError: none of 1000 ports is free.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    for port in range(first_port, min(first_port + 1000, 2**16)):
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
    raise PortError(f"no port from {first_port} on is free")
