"""Rank 0's end of the control connections: collects reports of all supervisors and broadcasts stops and the outcome."""

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path

from mixmae.base.liveness import HEARTBEAT_SECONDS, SILENT_SECONDS
from mixmae.base.ports import listening_address, reserve_port
from mixmae.launch.supervision.listening import listen
from mixmae.launch.supervision.membership import Limits, Membership
from mixmae.launch.supervision.outcome import USER, Exit, Outcome, log_file, write_outcome
from mixmae.launch.supervision.protocol import (
    PORTS,
    Connection,
    Message,
    authenticate_client,
)
from mixmae.launch.supervision.stuck import RankStatus

_POLL_SECONDS = 0.25
_GONE_SECONDS = 15.0
"""Seconds that supervisors may take to end their ranks after the outcome."""
_WRITE_SECONDS = 20.0
_MOST_STRANGERS = 256
"""Connections, beside one of each rank, that have not yet proved to know the secret."""


class Coordinator:
    """Serves until the run has ended.

    Args:
        secret: authenticates its clients.
        world_size: number of ranks that must join.
        launcher: whether the launching process must join too; the run ends when it is lost.
        folder: the attempt's folder, for the outcome file.
    """

    def __init__(self, secret: str, world_size: int, launcher: bool, limits: Limits, folder: Path) -> None:
        self._secret, self._folder = secret, folder
        self._membership = Membership(world_size, limits, launcher, time.monotonic())
        self._connections: dict[int, Connection] = {}
        self._launcher: Connection | None = None
        self._strangers = 0
        self._gone: dict[int, list[str]] = {}
        self._outcome: Outcome | None = None

    async def run(self, address: str, first_port: int) -> None:
        """Listens on the address, on the first free port from `first_port` on, until all ranks have ended.

        Raises:
            PortError: no port is free, or the address is not local.
        """
        own = await asyncio.to_thread(listening_address, address)
        server, port = await listen(self._serve, own, first_port)
        self._rendezvous = reserve_port(max(port, first_port + PORTS))
        heartbeats = asyncio.create_task(self._beat())
        try:
            outcome = await self._wait_for_outcome()
            await self._write(outcome)
            await self._end(outcome)
        finally:
            heartbeats.cancel()
            server.close()
            self._rendezvous.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        if await self._admits(connection):
            hello = await connection.receive()
            if hello is not None and hello["kind"] == "stop":
                self._stop(str(hello["signal"]), "the job")
            elif hello is not None and hello["kind"] == "hello":
                await (
                    self._serve_launcher(connection) if hello["rank"] is None else self._serve_rank(connection, hello)
                )
        await connection.close()

    async def _admits(self, connection: Connection) -> bool:
        """Whether a client knows the secret; of those that have not yet proved it only so many are heard at once."""
        if self._strangers >= self._membership.world_size + _MOST_STRANGERS:
            return False
        self._strangers += 1
        try:
            return await authenticate_client(connection, self._secret)
        finally:
            self._strangers -= 1

    async def _serve_rank(self, connection: Connection, hello: Message) -> None:
        rank, host = int(hello["rank"]), str(hello["host"])
        self._membership.join(rank, host, time.monotonic())
        if rank in self._connections:
            return
        self._connections[rank] = connection
        if self._outcome is not None:  # it joined too late: the others are ending already
            connection.send("end", outcome=self._outcome.to_json())
        while (message := await connection.receive()) is not None:
            self._handle(rank, host, message)
        if rank not in self._gone:
            self._membership.rank_lost(
                rank, time.monotonic(), "lost its supervisor, which was killed, or its host went down"
            )

    def _handle(self, rank: int, host: str, message: Message) -> None:
        now = time.monotonic()
        self._membership.heard_from(rank, now)
        match message["kind"]:
            case "beat":
                self._membership.heard_from(rank, now, RankStatus(**message["status"]) if message["status"] else None)
            case "signal":
                self._stop(str(message["signal"]), f"rank {rank} on {host}")
            case "exited":
                ended = Exit(message["code"], message["signal"], message["lines"])
                self._membership.rank_exited(rank, ended, now - float(message["age"]))
            case "abort":
                self._membership.abort(str(message["reason"]))
            case "gone":
                self._gone[rank] = message["lines"]

    async def _serve_launcher(self, connection: Connection) -> None:
        self._launcher = connection
        self._membership.launcher_joined()
        while (message := await connection.receive()) is not None:
            match message["kind"]:
                case "signal":
                    self._stop(str(message["signal"]), USER)
                case "abort":
                    self._membership.abort(str(message["reason"]))
        self._membership.abort("lost the launching process: it was killed, or its host is down")

    def _stop(self, name: str, who: str) -> None:
        first = self._membership.stop is None
        self._membership.request_stop(name, who, time.monotonic())
        if first:
            self._broadcast("signal", signal=name)

    def _broadcast(self, kind: str, **fields: object) -> None:
        for connection in [*self._connections.values(), *([self._launcher] if self._launcher else [])]:
            connection.send(kind, **fields)

    async def _beat(self) -> None:
        while True:
            self._broadcast("beat")
            launcher = self._launcher
            if launcher is not None and time.monotonic() - launcher.last_heard > SILENT_SECONDS:
                self._membership.abort(f"the launching process has been silent for {SILENT_SECONDS:.0f} s")
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _wait_for_outcome(self) -> Outcome:
        while (outcome := self._membership.outcome_at(time.monotonic())) is None:
            if self._membership.started is None and self._membership.complete and self._membership.stop is None:
                self._membership.start(time.monotonic())
                self._start()
            await asyncio.sleep(_POLL_SECONDS)
        if outcome.rank is not None:
            outcome = replace(outcome, log=str(log_file(self._folder, outcome.rank)))
        return outcome

    def _start(self) -> None:
        """Starts the ranks, with the port reserved for their rendezvous."""
        port = self._rendezvous.getsockname()[1]
        hosts = [member.host for member in self._membership.members.values()]
        for rank, connection in self._connections.items():
            connection.send("go", master_port=port, local_size=hosts.count(self._membership.members[rank].host))
        if self._launcher is not None:
            self._launcher.send("go")

    async def _end(self, outcome: Outcome) -> None:
        """Broadcasts the outcome, waits until the ranks have exited, and adds the last output of the failed rank."""
        self._outcome = outcome
        self._broadcast("end", outcome=outcome.to_json())
        deadline = time.monotonic() + _GONE_SECONDS
        while time.monotonic() < deadline and any(
            rank not in self._gone and self._membership.members[rank].lost is None for rank in self._connections
        ):
            await asyncio.sleep(_POLL_SECONDS / 5)
        if outcome.rank is not None and self._gone.get(outcome.rank):
            outcome = outcome.with_lines(self._gone[outcome.rank])
            await self._write(outcome)
        self._broadcast("close", outcome=outcome.to_json())
        for connection in [*self._connections.values(), *([self._launcher] if self._launcher else [])]:
            await connection.close()

    async def _write(self, outcome: Outcome) -> None:
        """Writes the outcome; a hanging file system or a full one must not keep the run from telling it, and ending."""
        with contextlib.suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(_WRITE_SECONDS):
                await asyncio.to_thread(write_outcome, self._folder, outcome)
