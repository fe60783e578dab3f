"""An HTTP server that slow or silent clients cannot hold up: each has seconds, and there are so many at once."""

import errno
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client.exposition import ThreadingWSGIServer

MAX_CONNECTIONS = 64
"""At once; one more ends the oldest."""
_PAUSE = 0.1
"""Seconds to wait where no descriptor is left: the listening socket stays ready, and would be asked at once again."""

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class HttpServer(ThreadingWSGIServer):
    """Serves a WSGI application, a thread for each connection."""

    deadline = 10.0
    """Seconds from a connection to its end, however it trickles."""

    def __init__(self, address: str, port: int, application: Application, family: socket.AddressFamily) -> None:
        """Binds and listens.

        Raises:
            OSError: the address is not this host's, or the port is taken.
        """
        self.address_family = family
        self._connections: dict[socket.socket, float] = {}
        """When each was accepted, the oldest first."""
        self._lock = threading.Lock()
        super().__init__((address, port), _QuietHandler)
        self.set_app(application)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6 and socket.has_dualstack_ipv6():
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks DNS for this host's name
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._end_oldest()
                time.sleep(_PAUSE)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            full = len(self._connections) >= MAX_CONNECTIONS
            self._connections[request] = time.monotonic()
        if full:
            self._end_oldest()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called between requests, and twice a second without any."""
        now = time.monotonic()
        with self._lock:
            for connection, accepted in self._connections.items():
                if now - accepted > self.deadline:
                    _end(connection)

    def _end_oldest(self) -> None:
        with self._lock:
            if self._connections:
                oldest = next(iter(self._connections))
                del self._connections[oldest]
                _end(oldest)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that says nothing, or no TLS, or hangs up is its own trouble, not the run's."""


class _QuietHandler(WSGIRequestHandler):
    timeout = 10
    """Seconds after which a scraper that says nothing is left."""

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""


def server_family(address: str) -> socket.AddressFamily:
    """IPv4 or IPv6, as the address is.

    Raises:
        OSError: it is none.
    """
    return socket.getaddrinfo(address or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]


def _end(connection: socket.socket) -> None:
    """Ends a connection that another thread reads: its next read finds the end.

    A TLS socket's own method would take away what that thread is using.
    """
    with suppress(OSError):  # the client was faster
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
