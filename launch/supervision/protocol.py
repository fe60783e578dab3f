"""The control connection between supervisors: JSON lines over TCP, authenticated by a shared secret."""

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from typing import Any

Message = dict[str, Any]

LONGEST = 2**20
"""Maximum bytes of a message."""
PORTS = 16
"""Number of ports in the coordinator's range: it listens on the first free one, clients try all."""
_HANDSHAKE_SECONDS = 5.0
_CONNECT_SECONDS = 3.0


class Connection:
    """One connection; `last_heard` is the monotonic time of the peer's last message."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.last_heard = time.monotonic()

    def send(self, kind: str, **fields: Any) -> None:
        """Sends without blocking: a peer that does not read sends no heartbeats either, and is dropped for that."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps({"kind": kind, **fields}).encode() + b"\n")

    async def receive(self) -> Message | None:
        """The next message; None if the connection is lost or the message is invalid."""
        try:
            message = json.loads(await self._reader.readuntil(b"\n"))
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError, RecursionError):
            return None
        self.last_heard = time.monotonic()
        return message if isinstance(message, dict) and "kind" in message else None

    async def close(self) -> None:
        """Flushes as far as the peer accepts data, and closes."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), _HANDSHAKE_SECONDS)
        except (OSError, TimeoutError):
            self._writer.transport.abort()


def _proof(secret: str, side: str, challenge: str) -> str:
    return hmac.new(secret.encode(), f"{side} {challenge}".encode(), hashlib.sha256).hexdigest()


async def authenticate_client(connection: Connection, secret: str) -> bool:
    """The server's handshake: whether the client knows the secret. The secret is not sent."""
    try:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            challenge = secrets.token_hex(16)
            connection.send("challenge", challenge=challenge)
            answer = await connection.receive()
            if answer is None or not _knows(answer, _proof(secret, "member", challenge)):
                return False
            connection.send("welcome", proof=_proof(secret, "coordinator", str(answer.get("challenge"))))
            return True
    except TimeoutError:
        return False


async def authenticate_to_server(connection: Connection, secret: str) -> bool:
    """The client's handshake: whether the server knows the secret too."""
    try:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            first = await connection.receive()
            if first is None:
                return False
            challenge = secrets.token_hex(16)
            connection.send("answer", proof=_proof(secret, "member", str(first.get("challenge"))), challenge=challenge)
            welcome = await connection.receive()
            return welcome is not None and _knows(welcome, _proof(secret, "coordinator", challenge))
    except TimeoutError:
        return False


def _knows(message: Message, proof: str) -> bool:
    return hmac.compare_digest(str(message.get("proof")).encode("utf-8", "replace"), proof.encode())


async def connect(address: str, first_port: int, secret: str) -> Connection | None:
    """Tries the coordinator's ports once; skips ports where other programs listen."""
    for port in range(first_port, first_port + PORTS):
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(address, port, limit=LONGEST)
        except TimeoutError:
            return None  # the host is unreachable, so its other ports are too
        except OSError:
            continue
        connection = Connection(reader, writer)
        if await authenticate_to_server(connection, secret):
            return connection
        await connection.close()
    return None
