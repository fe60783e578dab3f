"""One start of a run from this host: DeepSpeed's launcher as a child, and this process on the ranks' lifeline."""

import asyncio
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Protocol

from mixmae.base.errors import UsageError
from mixmae.base.exit_codes import FAILED, FINISHED, MISTAKE, PREEMPTED
from mixmae.launch.backends.job import Attempt, Command
from mixmae.launch.supervision.child import Child, ended_within
from mixmae.launch.supervision.guard import Guard
from mixmae.launch.supervision.outcome import USER, Outcome, read_outcome
from mixmae.launch.supervision.output import Console
from mixmae.launch.supervision.protocol import BEAT_SECONDS, SILENT_SECONDS, Line, find
from mixmae.launch.supervision.supervisor import STOPPING

LOG = "launcher.log"
_LOOK_SECONDS = 0.1
_SEEK_SECONDS = 0.5
_LEAVE_SECONDS = 40.0
"""How long DeepSpeed's launcher may take to notice that all ranks are done."""
_FAILED_LEAVE_SECONDS = 5.0
_TERM_SECONDS = 15.0
_SHOW_SECONDS = 10.0
_HOST_ENDED = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")


class Sweeping(Protocol):
    """What is to be known of how ranks are started."""

    @property
    def address(self) -> str:
        """Where rank 0's supervisor listens."""

    def sweep(self, attempt: Attempt) -> None:
        """Ends whatever a failed start may have left on other hosts."""


class Launcher:
    """Runs a command that starts ranks, and follows the run to its end.

    Args:
        folder: the attempt's.
        show: whether its output goes to the console, and not to the log alone.
    """

    def __init__(self, command: Command, way: Sweeping, attempt: Attempt, folder: Path, show: bool) -> None:
        self._command, self._way, self._attempt, self._folder = command, way, attempt, folder
        self._address, self._show = way.address, show
        self._stops = 0
        self._line: Line | None = None
        self._outcome: Outcome | None = None
        self._started = self._closed = False

    async def run(self, guard: Guard) -> Outcome:
        """Returns how the run ended; a start that left no word of it failed."""
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
                asyncio.get_running_loop().add_signal_handler(number, self._asked)
        console = Console() if self._show else None
        log = self._folder / LOG
        child = Child(self._command.arguments, {**os.environ, **self._command.environment}, log, console)
        guard.protect(child.group)
        following = asyncio.create_task(self._follow())
        await self._until_over(child, following)
        following.cancel()
        await self._leave(child)
        guard.release()
        outcome = self._outcome or read_outcome(self._folder) or self._without_word(child)
        if outcome.code not in (FINISHED, PREEMPTED) or self._outcome is None:
            await asyncio.to_thread(self._way.sweep, self._attempt)
        if console is not None:
            console.close(_SHOW_SECONDS)
        return outcome

    def _asked(self) -> None:
        """The user wants the run to stop: all ranks save and end; asked again, they just end."""
        self._stops += 1
        if self._line is None:
            return
        if self._stops == 1:
            self._line.say("signal", signal="SIGTERM")
            print("mixmae: stopping: all ranks save and end (once more ends them at once)", file=sys.stderr, flush=True)
        else:
            self._line.say("abort", reason="ended at once by the user")

    async def _follow(self) -> None:
        """Comes to the lifeline and listens to what becomes of the run."""
        while (line := await find(self._address, self._attempt.port, self._attempt.secret)) is None:
            await asyncio.sleep(_SEEK_SECONDS)
        line.say("hello", rank=None)
        self._line = line
        if self._stops:
            line.say("signal", signal="SIGTERM")
        beating = asyncio.create_task(self._beat(line))
        while not self._closed and (message := await line.hear()) is not None:
            self._started = self._started or message["kind"] == "go"
            if message["kind"] in ("end", "close"):
                self._outcome = Outcome(**message["outcome"])
                self._closed = message["kind"] == "close"
        beating.cancel()
        await line.close()

    async def _beat(self, line: Line) -> None:
        while time.monotonic() - line.heard < SILENT_SECONDS:
            line.say("beat")
            await asyncio.sleep(BEAT_SECONDS)
        # From here it is the ranks' side that is gone, whatever that side may say of this one.
        silent = f"was not heard for {SILENT_SECONDS:.0f} s; its host is down or unreachable"
        self._outcome = self._outcome or Outcome(FAILED, f"rank 0's supervisor on {self._address} {silent}")
        await line.close()

    async def _until_over(self, child: Child, following: "asyncio.Task[None]") -> None:
        """Until the ranks' end was told, or cannot be told any more."""
        while not following.done():
            reason = self._gone_before_its_time(child)
            if reason is not None and self._line is None:
                return
            if reason is not None and self._line is not None and self._outcome is None:
                self._line.say("abort", reason=reason)
            if self._stops and self._line is None:
                return
            await asyncio.sleep(_LOOK_SECONDS)

    def _gone_before_its_time(self, child: Child) -> str | None:
        """What of DeepSpeed's launcher ended although the run has not."""
        if (ended := child.poll()) is not None:
            return f"DeepSpeed's launcher {ended.in_words}"
        if not self._started:
            for line in child.output.last_lines():
                if match := _HOST_ENDED.search(line):
                    return f"host {match[1]}: ssh ended with exit code {match[2]} before its ranks reported"
        return None

    async def _leave(self, child: Child) -> None:
        """Ends DeepSpeed's launcher, which should have ended by itself where the run's end is known."""
        if self._outcome is not None:
            patience = _LEAVE_SECONDS if self._outcome.code in (FINISHED, PREEMPTED) else _FAILED_LEAVE_SECONDS
        else:
            child.send_to_group(signal.SIGTERM)
            patience = _TERM_SECONDS
        if not await ended_within(child, patience):
            child.send_to_group(signal.SIGKILL)
            await ended_within(child, patience)

    def _without_word(self, child: Child) -> Outcome:
        if self._stops and self._line is None:
            return Outcome(PREEMPTED, "stopped before the ranks started; nothing was done", stopped_by=USER)
        if self._line is not None:
            return Outcome(FAILED, f"lost rank 0's supervisor on {self._address}: it was killed, or its host is down; "
                           f"logs are in {self._folder}")  # fmt: skip
        reason = self._gone_before_its_time(child) or "DeepSpeed's launcher ended"
        mistake = child.ended is not None and child.ended.code == MISTAKE
        return Outcome(MISTAKE if mistake else FAILED, f"{reason}; its output is above, and in {self._folder / LOG}")


def run_attempt(command: Command, way: Sweeping, attempt: Attempt, run_dir: Path, show: bool = True) -> Outcome:
    """Starts a run once, and follows it to its end; `show` its output, which the log gets in any case.

    Raises:
        UsageError: another launch has the attempt's folder.
    """
    folder = attempt.folder(run_dir)
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UsageError(f"{run_dir} is being started by another launch since this second; start a run once") from error
    try:
        for file, text in command.files.items():
            file.touch(mode=0o600)
            file.write_text(text)
        return asyncio.run(Launcher(command, way, attempt, folder, show).run(Guard(signal.SIGTERM)))
    finally:
        for file in command.files:
            file.unlink()
