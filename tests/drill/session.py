"""Runs drills one after the other on one cluster, and checks the invariants after each."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.drill import invariants
from tests.drill.drill import Drill, DrillError
from tests.drill.faults import BACKENDS, Fault, draw
from tests.drill.rig import Rig
from tests.drill.runs import Run


@dataclass(frozen=True)
class Outcome:
    """The result of one drill.

    Attributes:
        fault: name of the fault.
        description: description of the fault.
        injected: the faults injected, with rank and step.
        recovery: how the run continued.
        exit_seconds: from the fault until the command exited; None if the run continued or restarted by itself.
        recovery_seconds: from the last fault until a later start completed a step; None where none had to.
        seconds: duration of the drill.
        problems: violated invariants and expectations; empty if the drill passed.
    """

    fault: str
    description: str
    backend: str
    stage: int
    injected: str
    recovery: str
    exit_seconds: float | None
    recovery_seconds: float | None
    seconds: float
    problems: Sequence[str]

    def describe(self) -> str:
        result = "passed" if not self.problems else f"FAILED: {'; '.join(self.problems)}"
        return f"{self.backend}: {self.description}: {self.injected}: {self.recovery} ({self.seconds:.0f} s): {result}"


def run_drills(
    rig: Rig, seed: int, count: int, backends: Sequence[str], only: Sequence[str] | None = None
) -> list[Outcome]:
    """Draws `count` faults and runs a drill of each; prints each outcome."""
    outcomes = []
    for number, (fault, backend) in enumerate(draw(random.Random(seed), count, backends, only), 1):
        outcome = run_drill(rig, fault, backend, f"{seed}-{number}")
        outcomes.append(outcome)
        print(f"{number}/{count} {outcome.describe()}", flush=True)
    return outcomes


def run_drill(rig: Rig, fault: Fault, backend: str, seed: str, stage: int | None = None) -> Outcome:
    """Runs one drill; repairs the cluster afterwards, and keeps the run directory if the drill failed.

    Args:
        stage: ZeRO stage; None draws one.
    """
    rng = random.Random(f"{fault.name} {backend} {seed}")
    drawn = rng.choice(fault.stages)
    stage = drawn if stage is None else stage
    baseline = rig.baseline(stage)
    run = rig.run(f"{seed}-{fault.name}-{backend}", BACKENDS[backend], stage)
    drill = Drill(rig, run, stage, rng)
    started = time.monotonic()
    try:
        fault.scenario(drill)
        problems = invariants.check_run(run, baseline, same_ranks=not drill.world_size_changes)
    except (DrillError, TimeoutError, RuntimeError) as error:
        problems = [str(error), *invariants.leaks(rig.cluster)]
    recovery = _recovery(run)
    rig.clear(run, keep=bool(problems))
    return Outcome(
        fault=fault.name,
        description=fault.description,
        backend=backend,
        stage=stage,
        injected=drill.injected,
        recovery=recovery,
        exit_seconds=drill.exits[0].seconds if run.starts > 1 and drill.exits else None,
        recovery_seconds=drill.recovery_seconds,
        seconds=time.monotonic() - started,
        problems=problems,
    )


def _recovery(run: Run) -> str:
    restarts = len(run.restarts())
    fallback = any(record["event"] == "fallback" for record in run.events())
    if run.starts == 1 and restarts == 0:
        return "continued"
    counts = [f"{restarts} time{'s'[: restarts > 1]} by itself"] if restarts else []
    counts += [f"{run.starts - 1} time{'s'[: run.starts > 2]} by its user"] if run.starts > 1 else []
    return f"restarted {' and '.join(counts)}{', from an older checkpoint with the reason logged' if fallback else ''}"
