"""A rank to which something is going to happen, at a step drawn by lot."""

from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from mixmae.base.exit_codes import FAILED
from tests.cluster.host import Host
from tests.drill.drill import END_SECONDS, Drill, DrillError
from tests.drill.rig import STEPS
from tests.drill.runs import Batch

LAST = STEPS - 12
"""After this step there is still some of the run left."""


@dataclass(frozen=True)
class Target:
    """A rank, where it runs, and the step that it was seen to have done.

    Attributes:
        everyone: all ranks' hosts and processes.
    """

    rank: int
    step: int
    everyone: Mapping[int, tuple[Host, psutil.Process]]

    @property
    def host(self) -> Host:
        return self.everyone[self.rank][0]

    @property
    def process(self) -> psutil.Process:
        return self.everyone[self.rank][1]

    @property
    def supervisor(self) -> psutil.Process:
        found = self.process.parent()
        assert found is not None
        return found

    def kill_everyone(self) -> None:
        """SIGKILL to all ranks; returns when they are gone and can save nothing any more."""
        for _, process in self.everyone.values():
            process.kill()
        psutil.wait_procs([process for _, process in self.everyone.values()], timeout=10)


def run_to_a_step(drill: Drill, first: int = 2, last: int = LAST, *overrides: str) -> Target:
    """Starts, as a user who lets the launcher start again or as one who does so himself, and waits for a drawn step."""
    drill.restarts = 3 if isinstance(drill.backend, Batch) else drill.rng.choice([0, 3])
    drill.start(drill.restarts, *overrides)
    return seen_at_a_step(drill, first, last)


def seen_at_a_step(drill: Drill, first: int = 2, last: int = LAST) -> Target:
    """Of a run that was started: one of its ranks, after a step drawn between these."""
    everyone, step = drill.ranks(), drill.rng.randint(first, last)
    drill.reach(step)
    return Target(drill.any_rank(), step, everyone)


def finish_naming(drill: Drill, target: Target, within: float | None = END_SECONDS) -> None:
    """To the end, the rank and its host being named: on the console where the user starts again, or in the record."""
    rank, host = target.rank, target.host.name
    if drill.restarts == 0:
        drill.ended([FAILED], f"rank {rank} on {host}", within=within)
        drill.start()
        drill.finish(again=0)
        return
    drill.finish(again=0)
    last = drill.run.restarts()[-1]
    if (last["rank"], last["host"]) != (rank, host):
        raise DrillError(f"the restart is laid to {last}, expected rank {rank} on {host}")


def require_saved(drill: Drill) -> None:
    """The run said that it was asked to stop and saved; what came after began there."""
    stops = [record["step"] for record in drill.told("preempted")]
    resumes = [record["step"] for record in drill.told("resumed")]
    if not stops or resumes != stops[: len(resumes)]:
        raise DrillError(f"stopped and saved at steps {stops}, resumed at {resumes}")
