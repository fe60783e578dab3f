"""One drill: starts a run, injects a fault, waits for recovery, and records exit codes and recovery time."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from mixmae.base.exit_codes import FINISHED
from mixmae.base.run_directory import checkpoint_name
from tests.cluster.host import Host
from tests.cluster.slurm import Slurm
from tests.drill.rig import Rig
from tests.drill.runs import Backend, Run

TIMEOUT = 240.0
"""Seconds that a drill waits for any condition before it fails."""
EXIT_SECONDS = 60.0
"""Seconds within which all ranks must exit after one of them failed."""
_POLL_SECONDS = 0.05


class DrillError(AssertionError):
    """A condition timed out, or an expectation of the drill does not hold."""


@dataclass
class Exit:
    """How one start of the run exited.

    Attributes:
        code: exit code of the command or the Slurm job.
        seconds: since the last fault was injected; None before the first.
    """

    code: int
    seconds: float | None


@dataclass
class Drill:
    """A run under test, with what a fault scenario needs to drive it.

    Attributes:
        rng: draws ranks, steps and delays.
        injected: description of the faults injected so far.
        exits: one for each start that has exited.
        recovery_seconds: from the last fault until a later start completed a step; None while none has.
        world_size_changes: whether the scenario changes the world size or ZeRO stage, so that results match the
            baseline to rounding only.
        max_restarts: without progress in between, that the launcher may do by itself.
    """

    rig: Rig
    run: Run
    stage: int
    rng: random.Random
    injected: str = ""
    exits: list[Exit] = field(default_factory=list)
    recovery_seconds: float | None = None
    world_size_changes: bool = False
    max_restarts: int = 0
    _injected_at: float | None = None
    _trainings_before: int = 0
    _output_offset: int = 0

    @property
    def backend(self) -> Backend:
        return self.run.backend

    def random_rank(self) -> int:
        return self.rng.randrange(self.backend.ranks)

    def start(self, max_restarts: int = 0, *overrides: str) -> None:
        """Runs the launch command, for the first time or again."""
        self._output_offset = len(self.run.output())
        self.run.start(max_restarts, *overrides)

    @property
    def launcher(self) -> "subprocess.Popen[str]":
        """The process of the last `mixmae launch`; not under Slurm, where it exits after submitting."""
        assert self.run.launcher is not None
        return self.run.launcher

    @property
    def job(self) -> int:
        """Id of the last Slurm job."""
        assert self.run.job is not None
        return self.run.job

    @property
    def slurm(self) -> Slurm:
        return self.rig.cluster.slurm

    def wait_for_step(self, step: int) -> None:
        """Waits until the run has completed this step."""
        self.wait_until(lambda: self.run.step() >= step, f"step {step}", alive=True)

    def wait_until(
        self, condition: Callable[[], Any], what: str, alive: bool = False, poll_seconds: float = _POLL_SECONDS
    ) -> None:
        """Waits until the condition is true.

        Args:
            what: the condition, for the error message.
            alive: whether to fail at once when the run exits.

        Raises:
            DrillError: after `TIMEOUT` seconds, or when the run exited and `alive` is set.
        """
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if alive and self.run.poll() is not None:
                raise DrillError(f"the run exited before {what}; its output:\n{self.run.output()[-3000:]}")
            if time.monotonic() > deadline:
                raise DrillError(f"no {what} after {TIMEOUT:.0f} s; output of the run:\n{self.run.output()[-3000:]}")
            time.sleep(poll_seconds)

    def sleep(self, seconds: float, unless: Callable[[], bool] = lambda: False) -> None:
        """Sleeps for that long, or until `unless` is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not unless():
            time.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))

    def ranks(
        self, besides: Mapping[int, tuple[Host, psutil.Process]] | None = None
    ) -> dict[int, tuple[Host, psutil.Process]]:
        """Waits for the processes of all ranks; returns them with their hosts, by rank.

        Args:
            besides: processes of an earlier start to ignore; they may still be alive.
        """
        found: dict[int, tuple[Host, psutil.Process]] = {}
        old = [process for _, process in besides.values()] if besides else []

        def all_running() -> bool:
            found.update({rank: there for rank, there in self.run.ranks().items() if there[1] not in old})
            return len(found) == self.backend.ranks

        self.wait_until(all_running, "processes of all ranks", alive=True)
        if len(hosts := {host.name for host, _ in found.values()}) != self.backend.host_count:
            raise DrillError(f"ranks on {', '.join(sorted(hosts))}, expected {self.backend.host_count} hosts")
        return found

    def events_of_kind(self, event: str) -> list[dict[str, Any]]:
        """Records of events.jsonl of this kind, oldest first."""
        return [record for record in self.run.events() if record["event"] == event]

    def inject(self, description: str, fault: Callable[[], Any]) -> None:
        """Injects a fault by calling `fault`, and records its description and time."""
        self.injected = f"{self.injected}; {description}" if self.injected else description
        self._trainings_before = self.run.training_starts()
        self.recovery_seconds = None
        fault()
        self._injected_at = time.monotonic()

    def pause_while_saving(self, process: psutil.Process) -> int:
        """SIGSTOPs a rank while all ranks save a checkpoint; returns the step of that checkpoint."""
        while True:
            self.wait_until(self.run.partial_checkpoints, "a save", alive=True, poll_seconds=0.0)
            partial = self.run.partial_checkpoints()
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(_POLL_SECONDS)
            step = int(partial[0].name.split("-")[1]) if partial else 0
            if partial and partial[0].exists() and not (self.run.checkpoints / checkpoint_name(step)).exists():
                return step
            os.kill(process.pid, signal.SIGCONT)

    def expect_exit(self, codes: Sequence[int], *messages: str, within: float | None = None) -> None:
        """Waits until this start exits.

        Args:
            codes: accepted exit codes.
            messages: texts that the console output must contain.
            within: seconds since the fault.

        Raises:
            DrillError: another exit code, a missing message, or an exit later than `within`.
        """
        code = self._wait_for_exit()
        output = self.run.output()[self._output_offset :]
        if code not in codes:
            raise DrillError(f"exit code {code}, expected {' or '.join(map(str, codes))}; output:\n{output[-3000:]}")
        if missing := [text for text in messages if text not in output]:
            raise DrillError(f"{missing[0]!r} is not in the output:\n{output[-3000:]}")
        seconds = self.exits[-1].seconds
        if within is not None and seconds is not None and seconds > within:
            raise DrillError(f"exited {seconds:.0f} s after the fault, expected at most {within:.0f} s")

    def finish(self, user_restarts: int = 1) -> None:
        """Waits until the run has finished; runs the same command again when it exits before, as a user would.

        Args:
            user_restarts: how often that is allowed.

        Raises:
            DrillError: the run exited before its last step more often than that.
        """
        while (code := self._wait_for_exit()) != FINISHED:
            if user_restarts == 0:
                raise DrillError(f"exit code {code}; output:\n{self.run.output()[-3000:]}")
            user_restarts -= 1
            self.start(self.max_restarts)

    def _wait_for_exit(self) -> int:
        """Waits for the exit code of this start; meanwhile records when training resumed."""
        codes: list[int] = []

        def exited() -> bool:
            if self.recovery_seconds is None and self._injected_at is not None and self._resumed_training():
                self.recovery_seconds = time.monotonic() - self._injected_at
            if (code := self.run.poll()) is not None:
                codes.append(code)
            return bool(codes)

        self.wait_until(exited, "exit of the run")
        self.exits.append(Exit(codes[0], None if self._injected_at is None else time.monotonic() - self._injected_at))
        return codes[0]

    def _resumed_training(self) -> bool:
        """Whether a start that began training after the last fault has completed a step."""
        trainings = 0
        for record in self.run.events():
            trainings += record["event"] in ("start", "resumed")
            if record["event"] == "step" and trainings > self._trainings_before:
                return True
        return False
