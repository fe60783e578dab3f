"""One fault in one run, from its first start to its end, and what is noted of it."""

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

PATIENCE = 240.0
"""Seconds in which anything that a drill waits for happens, or the drill has failed."""
END_SECONDS = 60.0
"""In which a failed rank must have ended the run everywhere."""
_POLL_SECONDS = 0.05


class DrillError(AssertionError):
    """Something that a drill waited for, or expects, is not so."""


@dataclass
class End:
    """How a start ended.

    Attributes:
        code: what its user saw.
        seconds: since the last strike; None before any.
    """

    code: int
    seconds: float | None


@dataclass
class Drill:
    """What a fault plays with.

    Attributes:
        rng: draws ranks, steps and moments.
        done: what was done to the run.
        ends: of the starts that are over.
        training: seconds from the last strike until a step was done that it had kept from being done.
        moves: whether the run is to end with other ranks than it began with, so that sums are rounded otherwise.
        restarts: in a row without progress that the launcher may do by itself.
    """

    rig: Rig
    run: Run
    stage: int
    rng: random.Random
    done: str = ""
    ends: list[End] = field(default_factory=list)
    training: float | None = None
    moves: bool = False
    restarts: int = 0
    _struck: float | None = None
    _begins: int = 0
    _said_before: int = 0

    @property
    def backend(self) -> Backend:
        return self.run.backend

    def any_rank(self) -> int:
        return self.rng.randrange(self.backend.ranks)

    def start(self, max_restarts: int = 0, *overrides: str) -> None:
        """Its user types the command, for the first time or again."""
        self._said_before = len(self.run.output())
        self.run.start(max_restarts, *overrides)

    @property
    def launcher(self) -> "subprocess.Popen[str]":
        """The last `mixmae launch` that its user typed, where it stays with the run."""
        assert self.run.launcher is not None
        return self.run.launcher

    @property
    def job(self) -> int:
        """The last job, under Slurm."""
        assert self.run.job is not None
        return self.run.job

    @property
    def slurm(self) -> Slurm:
        return self.rig.cluster.slurm

    def reach(self, step: int) -> None:
        """Waits until the run has done this step."""
        self.until(lambda: self.run.step() >= step, f"step {step}", alive=True)

    def until(self, holds: Callable[[], Any], what: str, alive: bool = False, pause: float = _POLL_SECONDS) -> None:
        """Waits for something.

        Args:
            alive: whether the end of the run is the end of all hope.
        """
        deadline = time.monotonic() + PATIENCE
        while not holds():
            if alive and self.run.poll() is not None:
                raise DrillError(f"the run ended before {what}; it said:\n{self.run.output()[-3000:]}")
            if time.monotonic() > deadline:
                raise DrillError(f"no {what} after {PATIENCE:.0f} s; the run said:\n{self.run.output()[-3000:]}")
            time.sleep(pause)

    def pause(self, seconds: float, unless: Callable[[], bool] = lambda: False) -> None:
        """Lets time pass, less of it if something comes true before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not unless():
            time.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))

    def ranks(
        self, besides: Mapping[int, tuple[Host, psutil.Process]] | None = None
    ) -> dict[int, tuple[Host, psutil.Process]]:
        """All ranks' processes, with their hosts, once they are there.

        Args:
            besides: those of an earlier start, which may still be there.
        """
        found: dict[int, tuple[Host, psutil.Process]] = {}
        old = [process for _, process in besides.values()] if besides else []

        def all_there() -> bool:
            found.update({rank: there for rank, there in self.run.ranks().items() if there[1] not in old})
            return len(found) == self.backend.ranks

        self.until(all_there, "all ranks' processes", alive=True)
        if len(hosts := {host.name for host, _ in found.values()}) != self.backend.spread:
            raise DrillError(f"ranks on {', '.join(sorted(hosts))}, expected {self.backend.spread} hosts")
        return found

    def told(self, event: str) -> list[dict[str, Any]]:
        """What the run said of such events, oldest first."""
        return [record for record in self.run.events() if record["event"] == event]

    def strike(self, description: str, act: Callable[[], Any]) -> None:
        """Does the damage, and notes what was done and when."""
        self.done = f"{self.done}; {description}" if self.done else description
        self._begins = self.run.begins()
        self.training = None
        act()
        self._struck = time.monotonic()

    def catch_saving(self, process: psutil.Process) -> int:
        """Stops a rank's process while it and all others save; returns the step that is saved."""
        while True:
            self.until(self.run.partial, "a save", alive=True, pause=0.0)
            partial = self.run.partial()
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(_POLL_SECONDS)
            step = int(partial[0].name.split("-")[1]) if partial else 0
            if partial and partial[0].exists() and not (self.run.checkpoints / checkpoint_name(step)).exists():
                return step
            os.kill(process.pid, signal.SIGCONT)

    def ended(self, codes: Sequence[int], *says: str, within: float | None = None) -> None:
        """Waits for the end of this start.

        Args:
            codes: one of which its user must see.
            says: what each must be read on the console.
            within: seconds since the strike.
        """
        code = self._over()
        said = self.run.output()[self._said_before :]
        if code not in codes:
            raise DrillError(
                f"ended with code {code}, expected {' or '.join(map(str, codes))}; it said:\n{said[-3000:]}"
            )
        if missing := [text for text in says if text not in said]:
            raise DrillError(f"did not say {missing[0]!r}, but:\n{said[-3000:]}")
        seconds = self.ends[-1].seconds
        if within is not None and seconds is not None and seconds > within:
            raise DrillError(f"ended {seconds:.0f} s after the fault, later than {within:.0f}")

    def finish(self, again: int = 1) -> None:
        """Waits for the run's last step; types the command again when it ended before, as its user would.

        Args:
            again: how often that may be needed.
        """
        while (code := self._over()) != FINISHED:
            if again == 0:
                raise DrillError(f"ended with code {code}; it said:\n{self.run.output()[-3000:]}")
            again -= 1
            self.start(self.restarts)

    def _over(self) -> int:
        """The exit code of this start, once it is over; notes meanwhile when the run trained again."""
        codes: list[int] = []

        def over() -> bool:
            if self.training is None and self._struck is not None and self._trains_again():
                self.training = time.monotonic() - self._struck
            if (code := self.run.poll()) is not None:
                codes.append(code)
            return bool(codes)

        self.until(over, "end of the run")
        self.ends.append(End(codes[0], None if self._struck is None else time.monotonic() - self._struck))
        return codes[0]

    def _trains_again(self) -> bool:
        """Whether a start that began after the last strike has done a step."""
        begun = 0
        for record in self.run.events():
            begun += record["event"] in ("start", "resumed")
            if record["event"] == "step" and begun > self._begins:
                return True
        return False
