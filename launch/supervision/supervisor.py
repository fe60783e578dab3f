"""The process beside each rank: starts it, forwards signals, and ends it with the run, in whatever state it is."""

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
from mixmae.base.heartbeat import HEARTBEAT, read_beat
from mixmae.base.liveness import HEARTBEAT_SECONDS, SILENT_SECONDS
from mixmae.base.ownership import HELD
from mixmae.base.ports import PortError
from mixmae.base.rank_env import RankEnv
from mixmae.base.run_directory import attempt_folder
from mixmae.launch.supervision.child import Child, ended_within
from mixmae.launch.supervision.coordinator import Coordinator
from mixmae.launch.supervision.membership import Limits
from mixmae.launch.supervision.orphans import Guard
from mixmae.launch.supervision.outcome import Outcome, log_file, mark_ended
from mixmae.launch.supervision.output import Console
from mixmae.launch.supervision.protocol import Connection, Message, connect
from mixmae.launch.supervision.stuck import rank_status
from mixmae.launch.supervision.token import TOKEN

STOPPING = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "SIGTERM",  # Python would raise KeyboardInterrupt within a step
    signal.SIGHUP: "SIGTERM",
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGUSR2: "SIGUSR2",
}
"""Signals that stop a run, and the signals that its ranks get."""
_SEEK_SECONDS = 0.5
_OWN_END_SECONDS = 3.0
_DUMP_SECONDS = 3.0
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class RankSpec:
    """What a supervisor starts.

    Attributes:
        command: starts the rank's process.
        run_dir: logs go to a folder below it.
        attempt: name of this start of the run.
        port: first port of the range that rank 0's supervisor may listen on.
        launcher: whether the launching process opens a control connection too.
        private: a file that every supervisor has read by the time that all have joined.
    """

    command: Sequence[str]
    run_dir: Path
    attempt: str
    port: int
    launcher: bool
    limits: Limits
    private: Path | None = None

    @property
    def folder(self) -> Path:
        return attempt_folder(self.run_dir, self.attempt)


class Supervisor:
    """Supervises one rank."""

    def __init__(self, spec: RankSpec, rank_env: RankEnv, secret: str, guard: Guard) -> None:
        self._spec, self._rank_env, self._secret, self._guard = spec, rank_env, secret, guard
        self._host = socket.gethostname()
        self._console = Console() if rank_env.is_main else None
        self._beats = os.memfd_create("heartbeat")  # leaves no file behind
        self._parent = os.getppid()
        self._connection: Connection | None = None
        self._child: Child | None = None
        self._stop: str | None = None
        self._child_changed = asyncio.Event()
        """Set whenever the rank's process may have exited."""

    async def run(self) -> int:
        """Supervises the rank from start to end; returns the run's exit code."""
        loop = asyncio.get_running_loop()
        for number, name in STOPPING.items():
            loop.add_signal_handler(number, self._on_stop_signal, name)
        loop.add_signal_handler(signal.SIGCHLD, self._child_changed.set)
        self._spec.folder.mkdir(parents=True, exist_ok=True)
        coordinator = asyncio.create_task(self._run_coordinator()) if self._rank_env.is_main else None
        code = await self._supervise(coordinator)
        if coordinator is not None:
            if self._connection is None:
                coordinator.cancel()
            with suppress(asyncio.CancelledError):
                await coordinator
        self._guard.release()
        if self._console is not None:
            self._console.close(_KILL_SECONDS)
        mark_ended(self._spec.folder)
        return code

    async def _run_coordinator(self) -> None:
        spec = self._spec
        coordinator = Coordinator(self._secret, self._rank_env.world_size, spec.launcher, spec.limits, spec.folder)
        await coordinator.run(self._rank_env.master_addr, spec.port)

    async def _supervise(self, coordinator: "asyncio.Task[None] | None") -> int:
        connection = self._connection = await self._connect(coordinator)
        if connection is None:
            return PREEMPTED if self._stop is not None else FAILED
        connection.send("hello", rank=self._rank_env.rank, host=self._host)
        if self._stop is not None:
            connection.send("signal", signal=self._stop)
        tasks = [asyncio.create_task(self._beat(connection)), asyncio.create_task(self._watch_child(connection))]
        try:
            return await self._follow_coordinator(connection)
        finally:
            for task in tasks:
                task.cancel()
            await connection.close()

    async def _connect(self, coordinator: "asyncio.Task[None] | None") -> Connection | None:
        """The control connection to rank 0's supervisor; None if it fails, or the run is stopped first."""
        deadline = time.monotonic() + self._spec.limits.join
        address = self._rank_env.master_addr
        while time.monotonic() < deadline and os.getppid() == self._parent:
            if coordinator is None and self._stop is not None:
                return None
            if coordinator is not None and coordinator.done():
                await coordinator  # raises why it could not listen
            connection = await connect(address, self._spec.port, self._secret)
            if connection is not None:
                return connection
            await asyncio.sleep(_SEEK_SECONDS)
        self._print_error(f"found no supervisor of rank 0 on {address}, ports from {self._spec.port} on")
        return None

    async def _follow_coordinator(self, connection: Connection) -> int:
        """Executes the coordinator's messages until it closes the connection."""
        outcome = None
        while (message := await connection.receive()) is not None:
            match message["kind"]:
                case "go":
                    self._start(message)
                case "signal":
                    if self._child is not None:
                        self._child.send(signal.Signals[message["signal"]])
                case "end":
                    outcome = Outcome(**message["outcome"])
                    await self._end_child()
                    connection.send("gone", lines=self._child.output.last_lines() if self._child else [])
                case "close":
                    break
        if outcome is not None:
            return outcome.code
        self._print_error(
            f"lost the supervisor of rank 0 on {self._rank_env.master_addr}; it was killed, or its host is down"
        )
        await self._end_child()
        return FAILED

    def _start(self, go: Message) -> None:
        if self._spec.private is not None:
            with suppress(OSError):
                self._spec.private.unlink(missing_ok=True)
        rank_env = replace(self._rank_env, master_port=int(go["master_port"]))
        threads = max(
            1, len(os.sched_getaffinity(0)) // (1 if "SLURM_CPUS_PER_TASK" in os.environ else go["local_size"])
        )
        environment = {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            **rank_env.environment(),
            HEARTBEAT: self._heartbeat,
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            **({HELD: "1"} if self._spec.launcher else {}),
        }
        del environment[TOKEN]
        log = log_file(self._spec.folder, rank_env.rank)
        self._child = Child(self._spec.command, environment, log, self._console, [self._beats])
        self._guard.protect(self._child.group)

    @property
    def _heartbeat(self) -> str:
        return f"/proc/self/fd/{self._beats}"

    def _on_stop_signal(self, name: str) -> None:
        """Reports a signal to stop; rank 0's supervisor forwards it to all ranks together."""
        self._stop = self._stop or name
        if self._connection is not None:
            self._connection.send("signal", signal=name)

    async def _beat(self, connection: Connection) -> None:
        while True:
            if time.monotonic() - connection.last_heard > SILENT_SECONDS:
                await connection.close()  # _follow_coordinator sees the loss
                return
            if os.getppid() != self._parent:
                connection.send(
                    "abort", reason=f"the process that started rank {self._rank_env.rank} on {self._host} was killed"
                )
            connection.send("beat", status=None if self._child is None else self._status(self._child))
            self._child_changed.set()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _watch_child(self, connection: Connection) -> None:
        """Reports the rank's exit as soon as it happens."""
        while self._child is None or (ended := self._child.poll()) is None:
            self._child_changed.clear()
            await self._child_changed.wait()
        connection.send("beat", status=self._status(self._child))
        age = time.monotonic() - self._child.ended_at
        connection.send("exited", code=ended.code, signal=ended.signal, lines=list(ended.lines), age=age)

    def _status(self, child: Child) -> dict[str, object]:
        return asdict(rank_status(read_beat(Path(self._heartbeat)), child.started, time.monotonic()))

    async def _end_child(self) -> None:
        """Ends the rank's process even if it hangs; the tracebacks of all threads go to its log."""
        child = self._child
        if child is None or await ended_within(child, _OWN_END_SECONDS):
            return
        child.dump_and_abort()
        if not await ended_within(child, _DUMP_SECONDS):
            child.send_to_group(signal.SIGKILL)
            await ended_within(child, _KILL_SECONDS)

    def _print_error(self, what: str) -> None:
        print(f"mixmae: rank {self._rank_env.rank} on {self._host} {what}", file=sys.stderr, flush=True)


def supervise(spec: RankSpec, rank_env: RankEnv, secret: str, guard: Guard) -> int:
    """Supervises a rank to its end; returns the run's exit code."""
    try:
        return asyncio.run(Supervisor(spec, rank_env, secret, guard).run())
    except PortError as error:
        print(f"mixmae: error: rank 0 on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return FAILED
