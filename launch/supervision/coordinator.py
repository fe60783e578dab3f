"""The first rank's end of the lifeline: it hears all ranks' supervisors, and tells them when and how the run ends."""

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path

from mixmae.launch.supervision.membership import Limits, Roll
from mixmae.launch.supervision.outcome import USER, Exit, Outcome, log_file, write_outcome
from mixmae.launch.supervision.ports import listen, own_address, reserve
from mixmae.launch.supervision.protocol import BEAT_SECONDS, PORTS, SILENT_SECONDS, Line, Message, admit
from mixmae.launch.supervision.stuck import Sighting

_JUDGE_SECONDS = 0.25
_GONE_SECONDS = 15.0
"""After the end was told, so long the ranks' supervisors have to end their ranks."""
_WRITE_SECONDS = 20.0


class Hub:
    """Serves until the run has ended.

    Args:
        secret: what its clients must know.
        world_size: ranks that are to come.
        launcher: whether the launching process is to come too; the run ends when it is gone.
        folder: the attempt's folder, where the outcome goes.
    """

    def __init__(self, secret: str, world_size: int, launcher: bool, limits: Limits, folder: Path) -> None:
        self._secret, self._folder = secret, folder
        self._roll = Roll(world_size, limits, launcher, time.monotonic())
        self._lines: dict[int, Line] = {}
        self._launcher: Line | None = None
        self._gone: dict[int, list[str]] = {}
        self._outcome: Outcome | None = None

    async def run(self, address: str, first_port: int) -> None:
        """Listens on the address, on the first free port from `first_port` on, until all ranks have ended.

        Raises:
            PortError: no port is free, or the address is not of this host.
        """
        server, port = await listen(self._serve, await own_address(address), first_port)
        self._meeting = reserve(max(port, first_port + PORTS))
        beating = asyncio.create_task(self._beat())
        try:
            outcome = await self._judge()
            await self._write(outcome)
            await self._end(outcome)
        finally:
            beating.cancel()
            server.close()
            self._meeting.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer)
        if await admit(line, self._secret):
            hello = await line.hear()
            if hello is not None and hello["kind"] == "stop":
                self._stop(str(hello["signal"]), "the job")
            elif hello is not None and hello["kind"] == "hello":
                await (self._serve_launcher(line) if hello["rank"] is None else self._serve_rank(line, hello))
        await line.close()

    async def _serve_rank(self, line: Line, hello: Message) -> None:
        rank, host = int(hello["rank"]), str(hello["host"])
        self._roll.join(rank, host, time.monotonic())
        if rank in self._lines:
            return
        self._lines[rank] = line
        if self._outcome is not None:  # too late: the others are ending already
            line.say("end", outcome=self._outcome.to_json())
        while (message := await line.hear()) is not None:
            self._take(rank, host, message)
        if rank not in self._gone:
            self._roll.loses(rank, time.monotonic(), "lost its supervisor, which was killed, or its host went down")

    def _take(self, rank: int, host: str, message: Message) -> None:
        now = time.monotonic()
        self._roll.hears(rank, now)
        match message["kind"]:
            case "beat":
                self._roll.hears(rank, now, Sighting(**message["sighting"]) if message["sighting"] else None)
            case "signal":
                self._stop(str(message["signal"]), f"rank {rank} on {host}")
            case "exited":
                ended = Exit(message["code"], message["signal"], message["lines"])
                self._roll.ends(rank, ended, now - float(message["age"]))
            case "abort":
                self._roll.abort(str(message["reason"]))
            case "gone":
                self._gone[rank] = message["lines"]

    async def _serve_launcher(self, line: Line) -> None:
        self._launcher = line
        self._roll.launcher_joins()
        while (message := await line.hear()) is not None:
            match message["kind"]:
                case "signal":
                    self._stop(str(message["signal"]), USER)
                case "abort":
                    self._roll.abort(str(message["reason"]))
        self._roll.abort("the process that launched the run is gone: it was killed, or its host is down")

    def _stop(self, name: str, who: str) -> None:
        first = self._roll.stop is None
        self._roll.asks_to_stop(name, who, time.monotonic())
        if first:
            self._tell_all("signal", signal=name)

    def _tell_all(self, kind: str, **fields: object) -> None:
        for line in [*self._lines.values(), *([self._launcher] if self._launcher else [])]:
            line.say(kind, **fields)

    async def _beat(self) -> None:
        while True:
            self._tell_all("beat")
            launcher = self._launcher
            if launcher is not None and time.monotonic() - launcher.heard > SILENT_SECONDS:
                self._roll.abort(f"the process that launched the run was not heard for {SILENT_SECONDS:.0f} s")
            await asyncio.sleep(BEAT_SECONDS)

    async def _judge(self) -> Outcome:
        while (outcome := self._roll.judge(time.monotonic())) is None:
            if self._roll.started is None and self._roll.complete and self._roll.stop is None:
                self._roll.start(time.monotonic())
                self._start()
            await asyncio.sleep(_JUDGE_SECONDS)
        if outcome.rank is not None:
            outcome = replace(outcome, log=str(log_file(self._folder, outcome.rank)))
        return outcome

    def _start(self) -> None:
        """All are there: the ranks start, and meet on the port that is kept for them."""
        port = self._meeting.getsockname()[1]
        hosts = [member.host for member in self._roll.members.values()]
        for rank, line in self._lines.items():
            line.say("go", master_port=port, local_size=hosts.count(self._roll.members[rank].host))
        if self._launcher is not None:
            self._launcher.say("go")

    async def _end(self, outcome: Outcome) -> None:
        """Tells everybody, waits until the ranks are gone, and adds what the one to blame said at its end."""
        self._outcome = outcome
        self._tell_all("end", outcome=outcome.to_json())
        deadline = time.monotonic() + _GONE_SECONDS
        while time.monotonic() < deadline and any(
            rank not in self._gone and self._roll.members[rank].lost is None for rank in self._lines
        ):
            await asyncio.sleep(_JUDGE_SECONDS / 5)
        if outcome.rank is not None and self._gone.get(outcome.rank):
            outcome = outcome.with_lines(self._gone[outcome.rank])
            await self._write(outcome)
        self._tell_all("close", outcome=outcome.to_json())
        for line in [*self._lines.values(), *([self._launcher] if self._launcher else [])]:
            await line.close()

    async def _write(self, outcome: Outcome) -> None:
        """Writes the record; a file system that hangs keeps nobody from ending."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WRITE_SECONDS):
                await asyncio.to_thread(write_outcome, self._folder, outcome)
