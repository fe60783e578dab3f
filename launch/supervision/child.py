"""A child process in its own process group; its output is drained and its exit code kept."""

import asyncio
import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mixmae.launch.supervision.outcome import Exit
from mixmae.launch.supervision.output import Console, Output

_DRAIN_SECONDS = 1.0
_POLL_SECONDS = 0.05


class Child:
    """Starts a process.

    Args:
        log: file for its standard output and error.
        console: additional sink of its output.
        descriptors: file descriptors that it inherits.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        console: Console | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=descriptors,
        )
        assert self._process.stdout is not None
        self.output = Output(self._process.stdout.fileno(), log, console)
        self.started = time.monotonic()
        self.ended: Exit | None = None
        self.ended_at = 0.0

    @property
    def group(self) -> int:
        return self._process.pid

    def poll(self) -> Exit | None:
        """The process's exit, or None while it runs. On exit the rest of its process group is killed.

        The group is killed before the process is reaped: until then its id cannot be reused.
        """
        if self.ended is not None:
            return self.ended
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        self.ended_at = time.monotonic()
        self.send_to_group(signal.SIGKILL)
        code = self._process.wait()
        self.output.close(_DRAIN_SECONDS)
        lines = self.output.last_lines()
        self.ended = Exit(code, lines=lines) if code >= 0 else Exit(None, -code, lines)
        return self.ended

    def send(self, number: signal.Signals) -> None:
        """Signals only the process, not its descendants."""
        if self.ended is None:
            os.kill(self._process.pid, number)

    def send_to_group(self, number: signal.Signals) -> None:
        """Signals the process and all descendants in its process group."""
        if self.ended is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def dump_and_abort(self) -> None:
        """Aborts the process; Python's fault handler prints all tracebacks, even if the interpreter hangs."""
        if self.ended is None:
            resource.prlimit(self._process.pid, resource.RLIMIT_CORE, (0, 0))
            self.send(signal.SIGABRT)


async def ended_within(child: Child, seconds: float) -> bool:
    """Waits up to `seconds` for the process to exit; returns whether it did."""
    deadline = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
    return child.ended is not None
