"""Real servers on this machine's loopback, for tests of what reads from a network."""

import os
import socket
import struct
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from unittest import mock
from urllib.parse import urlsplit

Fault = Literal["403", "404", "503", "stall", "cut", "no ranges", "reset"]
_BINARY = {"Content-Type": "application/octet-stream"}  # urllib's own would have moto look for a form


@dataclass
class HttpServer:
    """A static server that answers range requests, and fails where a test wants it to."""

    directory: Path
    url: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of every GET so far."""
    heads: list[str] = field(default_factory=list)
    """Path of every HEAD so far."""
    bytes_sent: int = 0
    """Of bodies."""
    always: Fault | None = None
    """What every request meets, after those of `fail`."""
    stall: float = 0.0
    """Seconds that a "stall" lasts."""
    _faults: deque[Fault] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, *faults: Fault) -> None:
        """Each of the next GETs meets one of these."""
        self._faults.extend(faults)

    def next_fault(self) -> Fault | None:
        with self._lock:
            return self._faults.popleft() if self._faults else self.always

    def sent(self, count: int) -> None:
        with self._lock:
            self.bytes_sent += count


@contextmanager
def http_server(directory: Path) -> Iterator[HttpServer]:
    """Serves the files of a directory over HTTP."""
    state = HttpServer(directory)

    class Handler(_Handler):
        served = state

    server = _Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # connections that clients keep open end with the test's process

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of these tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits for the client to acknowledge its head
    served: HttpServer

    def do_HEAD(self) -> None:
        self.served.heads.append(self.path)
        if (file := self._file()) is not None:
            self._head(HTTPStatus.OK, file.stat().st_size)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.served.requests.append((self.path, wanted))
        fault = self.served.next_fault()
        if fault in ("403", "404", "503"):
            self._head(HTTPStatus(int(fault)), 0)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            if fault == "stall":
                time.sleep(self.served.stall)
            self._send(None if fault == "no ranges" else wanted, cut=fault == "cut")

    def _send(self, wanted: str | None, cut: bool) -> None:
        if (file := self._file()) is None:
            return
        content = file.read_bytes()
        first, last = 0, len(content) - 1
        if wanted is not None:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
            if first > last:
                self._head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0)
                return
        body = content[first : last + 1]
        sent = body[: len(body) // 2] if cut else body
        self.served.sent(len(sent))
        span = f"bytes {first}-{last}/{len(content)}" if wanted is not None else None
        self._head(HTTPStatus.OK if wanted is None else HTTPStatus.PARTIAL_CONTENT, len(body), span)
        self.wfile.write(sent)
        self.close_connection = cut

    def _file(self) -> Path | None:
        file = self.served.directory / urllib.request.url2pathname(urlsplit(self.path).path).lstrip("/")
        if file.is_file():
            return file
        self._head(HTTPStatus.NOT_FOUND, 0)
        return None

    def _head(self, status: HTTPStatus, length: int, span: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if span is not None:
            self.send_header("Content-Range", span)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@dataclass
class S3Server:
    """An S3 endpoint in this process, with one bucket."""

    endpoint: str
    url: str
    """`s3://` and the bucket."""

    def put(self, name: str, content: bytes) -> None:
        """Stores an object; `name` may hold folders."""
        self.send(f"/{self.url.removeprefix('s3://')}/{name}", content)

    def send(self, path: str, content: bytes = b"") -> None:
        request = urllib.request.Request(self.endpoint + path, data=content, headers=_BINARY, method="PUT")
        urllib.request.urlopen(request).close()


@contextmanager
def s3_server(bucket: str = "photos") -> Iterator[S3Server]:
    """Runs moto's server; the environment names it and invented credentials to whatever reads S3 meanwhile."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    state = S3Server(f"http://{host}:{port}", f"s3://{bucket}")
    environment = {
        "AWS_ENDPOINT_URL": state.endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            state.send(f"/{bucket}")
            yield state
    finally:
        server.stop()
