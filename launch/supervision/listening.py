"""The coordinator's listening port: two runs on one host never take each other's ports."""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Awaitable, Callable

from mixmae.base.ports import PortError
from mixmae.launch.supervision.protocol import LONGEST, PORTS

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def listen(handler: Handler, address: str, first_port: int) -> tuple[asyncio.Server, int]:
    """Listens on the first free port of the coordinator's range; returns server and port.

    Raises:
        PortError: none is free, or the address is not local.
    """
    for port in range(first_port, first_port + PORTS):
        try:
            # Without SO_REUSEADDR, so that a port reserved by another run counts as taken.
            return await asyncio.start_server(handler, address, port, limit=LONGEST, reuse_address=False), port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise PortError(f"cannot listen on the master address {address}: {error.strerror}") from error
    raise PortError(f"ports {first_port} to {first_port + PORTS - 1} of {address} are all taken; set launch.port")


async def own_address(address: str) -> str:
    """The address to listen on: the master address, or any if the host's name resolves to its loopback interface.

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
