"""One start of a run from this host: DeepSpeed's launcher as a child, and a control connection to rank 0."""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from mixmae.base.errors import UsageError
from mixmae.base.exit_codes import FAILED, FINISHED, PREEMPTED, USAGE_ERROR
from mixmae.base.liveness import HEARTBEAT_SECONDS, SILENT_SECONDS
from mixmae.launch.backends.job_spec import Attempt, Command
from mixmae.launch.supervision.child import Child, ended_within
from mixmae.launch.supervision.orphans import Guard
from mixmae.launch.supervision.outcome import USER, Outcome, read_outcome
from mixmae.launch.supervision.output import Console
from mixmae.launch.supervision.protocol import Connection, connect
from mixmae.launch.supervision.supervisor import STOPPING

LOG = "launcher.log"
_POLL_SECONDS = 0.1
_SEEK_SECONDS = 0.5
_LEAVE_SECONDS = 40.0
"""Seconds that DeepSpeed's launcher may take to exit after all ranks."""
_FAILED_LEAVE_SECONDS = 5.0
_TERM_SECONDS = 15.0
_SHOW_SECONDS = 10.0
_HOST_ENDED = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")


class KillsLeftovers(Protocol):
    """The part of a backend that a start needs."""

    @property
    def address(self) -> str:
        """Where rank 0's supervisor listens."""

    def distribute(self, files: Mapping[Path, str]) -> None:
        """Writes files for their owner alone on other hosts."""

    def kill_leftovers(self, attempt: Attempt) -> None:
        """Kills processes that a failed start may have left on other hosts."""


class Launcher:
    """Runs a command that starts ranks, and follows the run to its end.

    Args:
        folder: the attempt's folder.
        show: whether its output goes to the console as well as to the log.
    """

    def __init__(self, command: Command, backend: KillsLeftovers, attempt: Attempt, folder: Path, show: bool) -> None:
        self._command, self._backend, self._attempt, self._folder = command, backend, attempt, folder
        self._address, self._show = backend.address, show
        self._stops = 0
        self._connection: Connection | None = None
        self._outcome: Outcome | None = None
        self._started = self._closed = False

    async def run(self, guard: Guard) -> Outcome:
        """Returns the run's outcome; a start without an outcome file has failed."""
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
                asyncio.get_running_loop().add_signal_handler(number, self._on_stop_signal)
        console = Console() if self._show else None
        log = self._folder / LOG
        child = Child(self._command.arguments, self._command.environment_in(os.environ), log, console)
        guard.protect(child.group)
        following = asyncio.create_task(self._follow())
        await self._wait_for_end(child, following)
        following.cancel()
        # Now: ranks that this process is about to end would record that they were stopped, not why.
        outcome = self._outcome or read_outcome(self._folder) or self._without_record(child)
        await self._end_child(child)
        guard.release()
        if outcome.code not in (FINISHED, PREEMPTED) or self._outcome is None:
            await asyncio.to_thread(self._backend.kill_leftovers, self._attempt)
        if console is not None:
            console.close(_SHOW_SECONDS)
        return outcome

    def _on_stop_signal(self) -> None:
        """Stops the run: all ranks save and exit; at the second signal they exit at once."""
        self._stops += 1
        if self._connection is None:
            return
        if self._stops == 1:
            self._connection.send("signal", signal="SIGTERM")
            print("mixmae: stopping: all ranks save and exit (again to stop at once)", file=sys.stderr, flush=True)
        else:
            self._connection.send("abort", reason="stopped at once by the user")

    async def _follow(self) -> None:
        """Opens the control connection and follows the run to its end."""
        while (connection := await connect(self._address, self._attempt.port, self._attempt.secret)) is None:
            await asyncio.sleep(_SEEK_SECONDS)
        connection.send("hello", rank=None)
        self._connection = connection
        if self._stops:
            connection.send("signal", signal="SIGTERM")
        heartbeats = asyncio.create_task(self._beat(connection))
        while not self._closed and (message := await connection.receive()) is not None:
            self._started = self._started or message["kind"] == "go"
            if message["kind"] in ("end", "close"):
                self._outcome = Outcome(**message["outcome"])
                self._closed = message["kind"] == "close"
        heartbeats.cancel()
        await connection.close()

    async def _beat(self, connection: Connection) -> None:
        while time.monotonic() - connection.last_heard < SILENT_SECONDS:
            connection.send("beat")
            await asyncio.sleep(HEARTBEAT_SECONDS)
        # Rank 0 is lost, whatever it may report about this process.
        silent = f"has been silent for {SILENT_SECONDS:.0f} s; its host is down or unreachable"
        self._outcome = self._outcome or Outcome(FAILED, f"rank 0's supervisor on {self._address} {silent}")
        await connection.close()

    async def _wait_for_end(self, child: Child, following: "asyncio.Task[None]") -> None:
        """Waits until the run's outcome is known, or can no longer become known."""
        while not following.done():
            reason = self._early_exit(child)
            if reason is not None and self._connection is None:
                return
            if reason is not None and self._connection is not None and self._outcome is None:
                self._connection.send("abort", reason=reason)
            if self._stops and self._connection is None:
                return
            await asyncio.sleep(_POLL_SECONDS)

    def _early_exit(self, child: Child) -> str | None:
        """Which part of DeepSpeed's launcher exited before the run ended."""
        ended = child.poll()
        if not self._started:
            for line in child.output.last_lines():
                if match := _HOST_ENDED.search(line):
                    return f"host {match[1]}: ssh ended with exit code {match[2]} before its ranks joined"
        return None if ended is None else f"DeepSpeed's launcher {ended.describe()}"

    async def _end_child(self, child: Child) -> None:
        """Stops DeepSpeed's launcher, which should exit by itself once the run has ended."""
        if self._outcome is not None:
            timeout = _LEAVE_SECONDS if self._outcome.code in (FINISHED, PREEMPTED) else _FAILED_LEAVE_SECONDS
        else:
            child.send_to_group(signal.SIGTERM)
            timeout = _TERM_SECONDS
        if not await ended_within(child, timeout):
            child.send_to_group(signal.SIGKILL)
            await ended_within(child, timeout)

    def _without_record(self, child: Child) -> Outcome:
        if self._stops and self._connection is None:
            return Outcome(PREEMPTED, "stopped before the ranks started; nothing was done", stopped_by=USER)
        if self._connection is not None:
            return Outcome(FAILED, f"lost rank 0's supervisor on {self._address}: it was killed, or its host is down; "
                           f"logs are in {self._folder}")  # fmt: skip
        reason = self._early_exit(child) or "DeepSpeed's launcher exited"
        mistake = child.ended is not None and child.ended.code == USAGE_ERROR
        log = self._folder / LOG
        code = USAGE_ERROR if mistake else FAILED
        return Outcome(code, f"{reason}; its output is in {log}", log=str(log), lines=child.output.last_lines())


def run_attempt(
    command: Command, backend: KillsLeftovers, attempt: Attempt, run_dir: Path, show: bool = True
) -> Outcome:
    """Starts a run once, and follows it to its end; `show` also prints its output on the console.

    Raises:
        UsageError: another launch has the attempt's folder.
    """
    folder = attempt.folder(run_dir)
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UsageError(f"{run_dir} is being started by another launch since this second; start a run once") from error
    try:
        for file, text in {**command.files, **command.private}.items():
            file.touch(mode=0o600)
            file.write_text(text)
        backend.distribute(command.private)
        return asyncio.run(Launcher(command, backend, attempt, folder, show).run(Guard(signal.SIGTERM)))
    finally:
        for file in (*command.files, *command.private):
            file.unlink(missing_ok=True)
