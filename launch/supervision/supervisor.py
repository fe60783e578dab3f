"""The process beside each rank: starts it, hands on signals, and ends it when the run ends, whatever state it is in."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mixmae.base.exit_codes import FAILED, PREEMPTED
from mixmae.base.heartbeat import FILE as HEARTBEAT
from mixmae.base.heartbeat import read_beat
from mixmae.base.rank_env import Place
from mixmae.base.run_directory import attempt_folder
from mixmae.launch.supervision.child import Child, ended_within
from mixmae.launch.supervision.coordinator import Hub
from mixmae.launch.supervision.guard import Guard
from mixmae.launch.supervision.membership import Limits
from mixmae.launch.supervision.outcome import Outcome, log_file, mark_over
from mixmae.launch.supervision.output import Console
from mixmae.launch.supervision.ports import PortError
from mixmae.launch.supervision.protocol import BEAT_SECONDS, SILENT_SECONDS, Line, Message, find
from mixmae.launch.supervision.stuck import sighting

TOKEN = "MIXMAE_TOKEN"
"""The environment variable with the secret that a start's supervisors share."""
STOPPING = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "SIGTERM",  # Python would raise KeyboardInterrupt in the midst of a step
    signal.SIGHUP: "SIGTERM",
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGUSR2: "SIGUSR2",
}
"""Signals that ask a run to stop, and what its ranks get."""
_SEEK_SECONDS = 0.5
_OWN_END_SECONDS = 3.0
_DUMP_SECONDS = 3.0
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Task:
    """What a supervisor is to do.

    Attributes:
        command: starts the rank's process.
        run_dir: where logs go, below.
        attempt: the name of this start of the run.
        port: the first of those on which the first rank's supervisor may listen.
        launcher: whether the launching process comes to the lifeline too.
    """

    command: Sequence[str]
    run_dir: Path
    attempt: str
    port: int
    launcher: bool
    limits: Limits

    @property
    def folder(self) -> Path:
        return attempt_folder(self.run_dir, self.attempt)


class Supervisor:
    """One rank's."""

    def __init__(self, task: Task, place: Place, secret: str, guard: Guard) -> None:
        self._task, self._place, self._secret, self._guard = task, place, secret, guard
        self._host = socket.gethostname()
        self._console = Console() if place.is_main else None
        self._beats = os.memfd_create("heartbeat")  # no file that somebody would have to remove
        self._parent = os.getppid()
        self._line: Line | None = None
        self._child: Child | None = None
        self._stop: str | None = None
        self._moved = asyncio.Event()
        """Set whenever the rank's process may have ended."""

    async def run(self) -> int:
        """Does all of it; returns the run's exit code."""
        loop = asyncio.get_running_loop()
        for number, name in STOPPING.items():
            loop.add_signal_handler(number, self._asked, name)
        loop.add_signal_handler(signal.SIGCHLD, self._moved.set)
        self._task.folder.mkdir(parents=True, exist_ok=True)
        hub = asyncio.create_task(self._open_hub()) if self._place.is_main else None
        code = await self._take_part(hub)
        if hub is not None:
            if self._line is None:
                hub.cancel()
            with suppress(asyncio.CancelledError):
                await hub
        self._guard.release()
        if self._console is not None:
            self._console.close(_KILL_SECONDS)
        mark_over(self._task.folder)
        return code

    async def _open_hub(self) -> None:
        task = self._task
        hub = Hub(self._secret, self._place.world_size, task.launcher, task.limits, task.folder)
        await hub.run(self._place.master_addr, task.port)

    async def _take_part(self, hub: "asyncio.Task[None] | None") -> int:
        line = self._line = await self._find_hub(hub)
        if line is None:
            return PREEMPTED if self._stop is not None else FAILED
        line.say("hello", rank=self._place.rank, host=self._host)
        if self._stop is not None:
            line.say("signal", signal=self._stop)
        beside = [asyncio.create_task(self._beat(line)), asyncio.create_task(self._watch_child(line))]
        try:
            return await self._follow(line)
        finally:
            for each in beside:
                each.cancel()
            await line.close()

    async def _find_hub(self, hub: "asyncio.Task[None] | None") -> Line | None:
        """The lifeline to the first rank's supervisor; None if there is none in time, or the run is stopped before."""
        deadline = time.monotonic() + self._task.limits.join
        address = self._place.master_addr
        while time.monotonic() < deadline and os.getppid() == self._parent:
            if hub is None and self._stop is not None:
                return None
            if hub is not None and hub.done():
                await hub  # raises what kept it from listening
            line = await find(address, self._task.port, self._secret)
            if line is not None:
                return line
            await asyncio.sleep(_SEEK_SECONDS)
        self._complain(f"found no supervisor of rank 0 on {address}, ports from {self._task.port} on")
        return None

    async def _follow(self, line: Line) -> int:
        """Does what the first rank's supervisor says, until it says that all is over."""
        outcome = None
        while (message := await line.hear()) is not None:
            match message["kind"]:
                case "go":
                    self._start(message)
                case "signal":
                    if self._child is not None:
                        self._child.send(signal.Signals[message["signal"]])
                case "end":
                    outcome = Outcome(**message["outcome"])
                    await self._end_child()
                    line.say("gone", lines=self._child.output.last_lines() if self._child else [])
                case "close":
                    break
        if outcome is not None:
            return outcome.code
        self._complain(
            f"lost the supervisor of rank 0 on {self._place.master_addr}; it was killed, or its host is down"
        )
        await self._end_child()
        return FAILED

    def _start(self, go: Message) -> None:
        place = replace(self._place, master_port=int(go["master_port"]))
        threads = max(
            1, len(os.sched_getaffinity(0)) // (1 if "SLURM_CPUS_PER_TASK" in os.environ else go["local_size"])
        )
        environment = {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            **place.environment(),
            HEARTBEAT: self._heartbeat,
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
        }
        del environment[TOKEN]
        log = log_file(self._task.folder, place.rank)
        self._child = Child(self._task.command, environment, log, self._console, [self._beats])
        self._guard.protect(self._child.group)

    @property
    def _heartbeat(self) -> str:
        return f"/proc/self/fd/{self._beats}"

    def _asked(self, name: str) -> None:
        """A signal to stop: not handed on at once, but to all ranks together, by the first one's supervisor."""
        self._stop = self._stop or name
        if self._line is not None:
            self._line.say("signal", signal=name)

    async def _beat(self, line: Line) -> None:
        while True:
            if time.monotonic() - line.heard > SILENT_SECONDS:
                await line.close()  # which whoever listens takes for the loss that it is
                return
            if os.getppid() != self._parent:
                line.say("abort", reason=f"the process that started rank {self._place.rank} on {self._host} was killed")
            line.say("beat", sighting=None if self._child is None else self._seen(self._child))
            self._moved.set()
            await asyncio.sleep(BEAT_SECONDS)

    async def _watch_child(self, line: Line) -> None:
        """Tells how the rank ended as soon as it did."""
        while self._child is None or (ended := self._child.poll()) is None:
            self._moved.clear()
            await self._moved.wait()
        line.say("beat", sighting=self._seen(self._child))
        age = time.monotonic() - self._child.ended_at
        line.say("exited", code=ended.code, signal=ended.signal, lines=list(ended.lines), age=age)

    def _seen(self, child: Child) -> dict[str, object]:
        return asdict(sighting(read_beat(Path(self._heartbeat)), child.started, time.monotonic()))

    async def _end_child(self) -> None:
        """Ends the rank, whatever it hangs in, leaving in its log where that is."""
        child = self._child
        if child is None or await ended_within(child, _OWN_END_SECONDS):
            return
        child.dump_and_abort()
        if not await ended_within(child, _DUMP_SECONDS):
            child.send_to_group(signal.SIGKILL)
            await ended_within(child, _KILL_SECONDS)

    def _complain(self, what: str) -> None:
        print(f"mixmae: rank {self._place.rank} on {self._host} {what}", file=sys.stderr, flush=True)


def supervise(task: Task, place: Place, secret: str, guard: Guard) -> int:
    """Supervises a rank to its end; returns the run's exit code."""
    try:
        return asyncio.run(Supervisor(task, place, secret, guard).run())
    except PortError as error:
        print(f"mixmae: error: rank 0 on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return FAILED
