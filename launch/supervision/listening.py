"""The coordinator's listening port: two runs on one host never take each other's ports."""

import asyncio
import errno
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
