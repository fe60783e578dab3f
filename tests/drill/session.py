"""Drills one after the other, on one cluster, each judged when it is over."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.drill import verdict
from tests.drill.drill import Drill, DrillError
from tests.drill.faults import BACKENDS, Fault, draw
from tests.drill.rig import Rig
from tests.drill.runs import Run


@dataclass(frozen=True)
class Outcome:
    """What became of a run to which something happened.

    Attributes:
        done: what was done to it, and when.
        how: how it continued.
        ended: seconds from the fault to the end of the start that it hit, as its user saw it; None if it
            continued or was restarted by itself.
        training: seconds from the fault until another start trained; None where none had to.
        problems: what does not hold; empty where all is as it must be.
    """

    fault: str
    description: str
    backend: str
    stage: int
    done: str
    how: str
    ended: float | None
    training: float | None
    seconds: float
    problems: Sequence[str]

    def describe(self) -> str:
        held = "held" if not self.problems else f"NOT HELD: {'; '.join(self.problems)}"
        return f"{self.backend}: {self.description}: {self.done}: {self.how} ({self.seconds:.0f} s): {held}"


def play_all(
    rig: Rig, seed: int, count: int, backends: Sequence[str], only: Sequence[str] | None = None
) -> list[Outcome]:
    """Draws so many faults and plays them; prints each outcome."""
    outcomes = []
    for number, (fault, backend) in enumerate(draw(random.Random(seed), count, backends, only), 1):
        outcome = play(rig, fault, backend, f"{seed}-{number}")
        outcomes.append(outcome)
        print(f"{number}/{count} {outcome.describe()}", flush=True)
    return outcomes


def play(rig: Rig, fault: Fault, backend: str, seed: str, stage: int | None = None) -> Outcome:
    """Plays one fault; the cluster is as before afterwards, and the run directory is kept if anything does not hold.

    Args:
        stage: of ZeRO; None draws one.
    """
    rng = random.Random(f"{fault.name} {backend} {seed}")
    drawn = rng.choice(fault.stages)
    stage = drawn if stage is None else stage
    undisturbed = rig.undisturbed(stage)
    run = rig.run(f"{seed}-{fault.name}-{backend}", BACKENDS[backend], stage)
    drill = Drill(rig, run, stage, rng)
    started = time.monotonic()
    try:
        fault.play(drill)
        problems = verdict.judge(run, undisturbed, same_ranks=not drill.moves)
    except (DrillError, TimeoutError, RuntimeError) as error:
        problems = [str(error), *verdict.strays(rig.cluster)]
    how = _how(run)
    rig.clear(run, keep=bool(problems))
    return Outcome(
        fault=fault.name,
        description=fault.description,
        backend=backend,
        stage=stage,
        done=drill.done,
        how=how,
        ended=drill.ends[0].seconds if run.starts > 1 and drill.ends else None,
        training=drill.training,
        seconds=time.monotonic() - started,
        problems=problems,
    )


def _how(run: Run) -> str:
    restarts = len(run.restarts())
    fallback = any(record["event"] == "fallback" for record in run.events())
    if run.starts == 1 and restarts == 0:
        return "continued"
    again = [f"{restarts} time{'s'[: restarts > 1]} by itself"] if restarts else []
    again += [f"{run.starts - 1} time{'s'[: run.starts > 2]} by its user"] if run.starts > 1 else []
    return f"restarted {' and '.join(again)}{', saying why not from the newest checkpoint' if fallback else ''}"
