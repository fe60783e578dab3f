"""A node's exporter: /metrics and /healthz over HTTP, from what the node's ranks record.

A process of its own, started by the node's first rank: it takes nothing from a rank's time, and goes on answering when
ranks hang. It ends with the rank that started it. After a clean end its target file is gone; after a crash it stays, so
that Prometheus sees a node that is down. It has the rank's output for its own, and waits for no reader of that.
"""

import argparse
import base64
import errno
import functools
import hmac
import os
import select
import shutil
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, delete_from_gateway, make_wsgi_app, push_to_gateway
from prometheus_client.exposition import basic_auth_handler, default_handler

from mixmae.base.files import read_regular
from mixmae.base.liveness import STALL_SECONDS
from mixmae.base.redaction import redact
from mixmae.monitoring.exporter.collector import NodeCollector
from mixmae.monitoring.exporter.discovery import run_label, write_target
from mixmae.monitoring.exporter.http_server import HttpServer, server_family
from mixmae.monitoring.exporter.recorder import read_ranks

PORTS = 100
"""Ports tried, from the wanted one on."""
UNUSABLE = 2
"""Exit code where something the user gave cannot be used: another start would end the same way."""
PUSHGATEWAY = "MIXMAE_PUSHGATEWAY"
"""The environment variable with the gateway's URL, which may hold a password: command lines are seen by all users."""
ENDED_JOB = "mixmae_ended"
"""The job of metrics on a Pushgateway: no alert looks at them, as nothing of an ended run is late."""
_PARENT_CHECK = 1.0
_GATEWAY_TIMEOUT = 4.0
"""Seconds: less than a run waits for its exporter."""


class ExporterError(ValueError):
    """Something the user gave cannot be used."""


@dataclass(frozen=True)
class Settings:
    """How a node's exporter is reached."""

    shared: Path
    """Folder of the ranks' recorders."""
    run_dir: Path
    address: str = "127.0.0.1"
    port: int = 9400
    stall_seconds: float = STALL_SECONDS
    certfile: Path | None = None
    keyfile: Path | None = None
    auth_file: Path | None = None
    """One line, `user:password`."""
    pushgateway: str | None = None
    """http(s)://[user:password@]host:port"""
    run: str | None = None
    """What all nodes call the run; None: as `run_label` does."""

    @property
    def run_label(self) -> str:
        return self.run or run_label(self.run_dir)

    @property
    def scheme(self) -> str:
        return "http" if self.certfile is None else "https"


class Exporter:
    """The HTTP server of a node."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        """Binds the first free port.

        Raises:
            ExporterError: no port is free, the address is not this host's, or a file cannot be used.
        """
        self.settings, self._clock = settings, clock
        self._started = clock()
        self.registry = CollectorRegistry()
        self.registry.register(NodeCollector(settings.shared, settings.run_dir))
        self._metrics = make_wsgi_app(self.registry)
        self._credentials = _read_credentials(settings.auth_file)
        self._server = self._bind()
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def target(self) -> str:
        """`host:port`, as another host would call it."""
        address = self.settings.address
        host = socket.gethostname() if address in ("", "0.0.0.0", "::") else address
        return f"{f'[{host}]' if ':' in host else host}:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"{self.settings.scheme}://{self.target}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def push(self) -> None:
        """Pushes the last metrics to the Pushgateway, for runs that end between two scrapes."""
        if self.settings.pushgateway is not None:
            self._call_gateway(push_to_gateway, registry=self.registry)

    def take_back(self) -> None:
        """Removes from the Pushgateway what an earlier end of this run left there: the run goes on."""
        if self.settings.pushgateway is not None:
            self._call_gateway(delete_from_gateway)

    def _call_gateway(self, call: Callable[..., None], **what: CollectorRegistry) -> None:
        gateway = str(self.settings.pushgateway)
        node_of_run = {"run": self.settings.run_label, "node": socket.gethostname()}
        try:
            address, handler = _gateway(gateway)
            call(address, job=ENDED_JOB, grouping_key=node_of_run, timeout=_GATEWAY_TIMEOUT, handler=handler, **what)
        except Exception as error:  # no address, no answer, no HTTP: whatever it is, the run has ended well
            _say(sys.stderr, redact(f"mixmae: monitoring.pushgateway={gateway} accepts no metrics: {error}"))

    def _bind(self) -> Any:
        settings = self.settings
        try:
            family = server_family(settings.address)
        except OSError as error:
            raise ExporterError(f"monitoring.address={settings.address} is no address: {error.strerror}") from error
        for port in range(settings.port, settings.port + PORTS) if settings.port else (0,):
            try:
                server = HttpServer(settings.address, port, self._answer, family)
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):  # taken, or not ours to take
                    continue
                raise ExporterError(f"monitoring.address={settings.address}: {error.strerror or error}") from error
            if settings.certfile is not None:
                context = _tls(settings.certfile, settings.keyfile)
                # The handshake waits for the first read, in its own thread: a client that is silent keeps no other out.
                server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
            return server
        raise ExporterError(f"monitoring.port={settings.port}: none of {PORTS} ports from there on is free")

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self._credentials and not self._admits(environ.get("HTTP_AUTHORIZATION", "")):
            start_response("401 Unauthorized", [("WWW-Authenticate", 'Basic realm="mixmae"')])
            return [b"authentication required\n"]
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            return self._metrics(environ, start_response)
        if path == "/healthz":
            late = self.late_ranks()
            start_response("503 Service Unavailable" if late else "200 OK", [("Content-Type", "text/plain")])
            return [f"no step finished for {self.settings.stall_seconds:g} s: {late}\n".encode() if late else b"ok\n"]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"/metrics or /healthz\n"]

    def late_ranks(self) -> str:
        """Ranks whose last step is too long ago, with their seconds; empty if there are none."""
        now, late = self._clock(), []
        for rank, values in read_ranks(self.settings.shared):
            beats = [value.value for value in values if value.metric == "heartbeat_timestamp_seconds"]
            age = now - (beats[0] if beats and beats[0] else self._started)
            if age > self.settings.stall_seconds:
                late.append(f"rank {rank} ({age:.0f} s)")
        return ", ".join(late)

    def _admits(self, header: str) -> bool:
        kind, _, content = header.partition(" ")
        try:
            given = base64.b64decode(content, validate=True)
        except ValueError:
            return False
        return kind.lower() == "basic" and hmac.compare_digest(given, self._credentials)


def _gateway(url: str) -> tuple[str, Callable[..., Callable[[], None]]]:
    """A Pushgateway's address without user and password, and what sends them."""
    with_scheme = url if "://" in url else f"http://{url}"
    user, at, host = urllib.parse.urlsplit(with_scheme).netloc.rpartition("@")
    if not at:
        return url, default_handler
    name, _, password = map(urllib.parse.unquote, user.partition(":"))
    address = urllib.parse.urlsplit(with_scheme)._replace(netloc=host).geturl()
    return address, functools.partial(basic_auth_handler, username=name, password=password)


def check_files(certfile: Path | None, keyfile: Path | None, auth_file: Path | None) -> None:
    """Raises ExporterError if TLS or passwords could not be set up with these files."""
    _read_credentials(auth_file)
    if certfile is not None:
        _tls(certfile, keyfile)


def _read_credentials(file: Path | None) -> bytes:
    if file is None:
        return b""
    try:
        content = read_regular(file).decode().strip()
    except OSError as error:
        raise ExporterError(f"monitoring.auth_file={file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ExporterError(
            f"monitoring.auth_file={file} is not UTF-8 text; expected one line, user:password"
        ) from error
    if ":" not in content or "\n" in content:
        raise ExporterError(f"monitoring.auth_file={file}: expected one line, user:password")
    return content.encode()


def _tls(certfile: Path, keyfile: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile, password="")  # which it would ask a terminal for
    except (OSError, ssl.SSLError) as error:
        raise ExporterError(f"monitoring.certfile={certfile}, keyfile={keyfile} cannot be used: {error}") from error
    return context


def _say(stream: TextIO, line: str) -> None:
    """Prints a line, or does not where nobody reads: waiting for room, this would miss the end of its rank."""
    if select.select([], [stream], [], 0)[1]:
        with suppress(OSError):
            os.write(stream.fileno(), f"{line}\n".encode())


def main(argv: Sequence[str]) -> int:
    """Serves until the process that started it says so (SIGTERM: a clean end), or is gone."""
    parser = argparse.ArgumentParser(prog="mixmae.monitoring.exporter.server", description=__doc__)
    for field in ("shared", "run-dir"):
        parser.add_argument(f"--{field}", type=Path, required=True)
    for field in ("certfile", "keyfile", "auth-file"):
        parser.add_argument(f"--{field}", type=Path)
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9400)
    parser.add_argument("--stall-seconds", type=float, default=STALL_SECONDS)
    parser.add_argument("--run")
    parser.add_argument("--parent", type=int, default=os.getppid())
    given = vars(parser.parse_args(argv))
    parent, settings = given.pop("parent"), Settings(**given, pushgateway=os.environ.get(PUSHGATEWAY))
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the ranks; the first of them ends this
    try:
        exporter = Exporter(settings)
    except ExporterError as error:
        _say(sys.stderr, f"mixmae: no metrics are exported: {error}")
        return UNUSABLE
    target = write_target(settings.run_dir, socket.gethostname(), exporter.target, settings.scheme, settings.run_label)
    _say(sys.stdout, f"metrics at {exporter.url}, announced in {target}")
    exporter.take_back()
    while not ended.wait(_PARENT_CHECK) and os.getppid() == parent:
        pass
    clean = ended.is_set()
    try:
        if clean:
            target.unlink(missing_ok=True)
            exporter.push()
    finally:
        exporter.close()
        if os.getppid() != parent:  # which cannot do it any more; as long as it lives, it may start another exporter
            shutil.rmtree(settings.shared, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
