"""Messages between supervisors: JSON, one a line, over TCP between ends that know the same secret."""

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from typing import Any

Message = dict[str, Any]

LONGEST = 2**20
"""Bytes of a message."""
PORTS = 16
"""The lifeline listens on the first free one of so many ports; whoever looks for it tries them all."""
BEAT_SECONDS = 2.0
"""Between two signs of life, each way."""
SILENT_SECONDS = 20.0
"""An end that was not heard for so long is gone."""
_HANDSHAKE_SECONDS = 5.0
_CONNECT_SECONDS = 3.0


class Line:
    """One connection; `heard` is when anything last came from the other end, by the monotonic clock."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.heard = time.monotonic()

    def say(self, kind: str, **fields: Any) -> None:
        """Sends without waiting: whoever does not read is silent too, and given up for that."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps({"kind": kind, **fields}).encode() + b"\n")

    async def hear(self) -> Message | None:
        """The next message; None once the connection is gone, or speaks something else."""
        try:
            message = json.loads(await self._reader.readuntil(b"\n"))
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError):
            return None
        self.heard = time.monotonic()
        return message if isinstance(message, dict) and "kind" in message else None

    async def close(self) -> None:
        """Sends what is still to be sent, as far as the other end takes it."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), _HANDSHAKE_SECONDS)
        except (OSError, TimeoutError):
            self._writer.transport.abort()


def _proof(secret: str, side: str, challenge: str) -> str:
    return hmac.new(secret.encode(), f"{side} {challenge}".encode(), hashlib.sha256).hexdigest()


async def admit(line: Line, secret: str) -> bool:
    """The listening end's handshake: whether the other one knows the secret, without showing it."""
    try:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            challenge = secrets.token_hex(16)
            line.say("challenge", challenge=challenge)
            answer = await line.hear()
            if answer is None or not _knows(answer, _proof(secret, "member", challenge)):
                return False
            line.say("welcome", proof=_proof(secret, "hub", str(answer.get("challenge"))))
            return True
    except TimeoutError:
        return False


async def introduce(line: Line, secret: str) -> bool:
    """The connecting end's handshake."""
    try:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            first = await line.hear()
            if first is None:
                return False
            challenge = secrets.token_hex(16)
            line.say("answer", proof=_proof(secret, "member", str(first.get("challenge"))), challenge=challenge)
            welcome = await line.hear()
            return welcome is not None and _knows(welcome, _proof(secret, "hub", challenge))
    except TimeoutError:
        return False


def _knows(message: Message, proof: str) -> bool:
    return hmac.compare_digest(str(message.get("proof")), proof)


async def find(address: str, first_port: int, secret: str) -> Line | None:
    """One look for the hub on its possible ports; what else listens there is passed over."""
    for port in range(first_port, first_port + PORTS):
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(address, port, limit=LONGEST)
        except TimeoutError:
            return None  # the host does not answer at all, so its other ports will not either
        except OSError:
            continue
        line = Line(reader, writer)
        if await introduce(line, secret):
            return line
        await line.close()
    return None
