"""The target of a fault: a rank and a step drawn at random (seeded)."""

from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from mixmae.base.exit_codes import FAILED
from tests.cluster.host import Host
from tests.drill.drill import EXIT_SECONDS, Drill, DrillError
from tests.drill.rig import STEPS
from tests.drill.runs import SlurmJob

LAST = STEPS - 12
"""The last step to inject a fault after: some steps of the run remain."""


@dataclass(frozen=True)
class Target:
    """A rank and the step after which it was picked.

    Attributes:
        processes: hosts and processes of all ranks, by rank.
    """

    rank: int
    step: int
    processes: Mapping[int, tuple[Host, psutil.Process]]

    @property
    def host(self) -> Host:
        return self.processes[self.rank][0]

    @property
    def process(self) -> psutil.Process:
        return self.processes[self.rank][1]

    @property
    def supervisor(self) -> psutil.Process:
        found = self.process.parent()
        assert found is not None
        return found

    def kill_all_ranks(self) -> None:
        """SIGKILLs all ranks; returns when they have exited, so that nothing is saved any more."""
        for _, process in self.processes.values():
            process.kill()
        psutil.wait_procs([process for _, process in self.processes.values()], timeout=10)


def start_and_pick_target(drill: Drill, first: int = 2, last: int = LAST, *overrides: str) -> Target:
    """Starts the run, with automatic restarts or without, and picks a target after a random step."""
    drill.max_restarts = 3 if isinstance(drill.backend, SlurmJob) else drill.rng.choice([0, 3])
    drill.start(drill.max_restarts, *overrides)
    return pick_target(drill, first, last)


def pick_target(drill: Drill, first: int = 2, last: int = LAST) -> Target:
    """Waits for a random step from `first` to `last`; returns a random rank."""
    processes, step = drill.ranks(), drill.rng.randint(first, last)
    drill.wait_for_step(step)
    return Target(drill.random_rank(), step, processes)


def finish_and_check_cause(drill: Drill, target: Target, within: float | None = EXIT_SECONDS) -> None:
    """Finishes the run; expects the failed rank and host on the console, or in restarts.jsonl if it restarts itself."""
    rank, host = target.rank, target.host.name
    if drill.max_restarts == 0:
        drill.expect_exit([FAILED], f"rank {rank} on {host}", within=within)
        drill.start()
        drill.finish(user_restarts=0)
        return
    drill.finish(user_restarts=0)
    last = drill.run.restarts()[-1]
    if (last["rank"], last["host"]) != (rank, host):
        raise DrillError(f"restarts.jsonl names {last} as the cause, expected rank {rank} on {host}")


def require_saved_on_stop(drill: Drill) -> None:
    """Expects a `preempted` event for each stop, and each later start to resume at the step saved there."""
    stops = [record["step"] for record in drill.events_of_kind("preempted")]
    resumes = [record["step"] for record in drill.events_of_kind("resumed")]
    if not stops or resumes != stops[: len(resumes)]:
        raise DrillError(f"preempted and saved at steps {stops}, resumed at {resumes}")
