"""The control connection between supervisors: JSON lines over TCP, authenticated by a shared secret.

Both ends prove that they know it, and each message from then on: what somebody in between adds, changes, repeats or
leaves out ends the connection. Nothing is encrypted.
"""

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from typing import Any

from mixmae.base.json_text import parse_json

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
        self._sign: _Signature | None = None
        self._verify: _Signature | None = None
        self.last_heard = time.monotonic()

    def sign(self, secret: str, own: str, peer: str, challenges: str) -> None:
        """Has all further messages signed, and those of the peer verified.

        Args:
            own, peer: the names of the two sides.
            challenges: of both ends, which nobody can have used before.
        """
        self._sign, self._verify = (
            _Signature(_proof(secret, f"messages of {side}", challenges)) for side in (own, peer)
        )

    def send(self, kind: str, **fields: Any) -> None:
        """Sends without blocking: a peer that does not read sends no heartbeats either, and is dropped for that."""
        if not self._writer.is_closing():
            line = json.dumps({"kind": kind, **fields}).encode()
            self._writer.write((line if self._sign is None else self._sign(line) + b" " + line) + b"\n")

    async def receive(self) -> Message | None:
        """The next message; None if the connection is lost, or the message is invalid or wrongly signed."""
        try:
            line = (await self._reader.readuntil(b"\n")).removesuffix(b"\n")
            if self._verify is not None:
                signature, _, line = line.partition(b" ")
                if not hmac.compare_digest(signature, self._verify(line)):
                    return None
            message = parse_json(line)
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError):
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


class _Signature:
    """Signs one direction's messages by their order."""

    def __init__(self, key: str) -> None:
        self._key, self._count = key.encode(), 0

    def __call__(self, line: bytes) -> bytes:
        self._count += 1
        return hmac.new(self._key, b"%d " % self._count + line, hashlib.sha256).hexdigest().encode()


def _proof(secret: str, side: str, challenge: str) -> str:
    return hmac.new(secret.encode(), f"{side} {challenge}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()


async def authenticate_client(connection: Connection, secret: str) -> bool:
    """The server's handshake: whether the client knows the secret. The secret is not sent."""
    try:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            challenge = secrets.token_hex(16)
            connection.send("challenge", challenge=challenge)
            answer = await connection.receive()
            if answer is None or not _knows(answer, _proof(secret, "member", challenge)):
                return False
            theirs = str(answer.get("challenge"))
            connection.send("welcome", proof=_proof(secret, "coordinator", theirs))
            connection.sign(secret, "coordinator", "member", f"{challenge} {theirs}")
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
            challenge, theirs = secrets.token_hex(16), str(first.get("challenge"))
            connection.send("answer", proof=_proof(secret, "member", theirs), challenge=challenge)
            welcome = await connection.receive()
            if welcome is None or not _knows(welcome, _proof(secret, "coordinator", challenge)):
                return False
            connection.sign(secret, "member", "coordinator", f"{theirs} {challenge}")
            return True
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
