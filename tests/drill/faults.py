"""The registry of faults, and the seeded choice of the faults that a drill injects."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice

from tests.drill.drill import Drill
from tests.drill.runs import Backend, Hostfile, Local, SlurmJob

BACKENDS: dict[str, Backend] = {
    "local": Local(2),
    "hostfile": Hostfile(("node1", "node2")),
    "slurm": SlurmJob(nodes=2),
}
Scenario = Callable[[Drill], None]


@dataclass(frozen=True)
class Fault:
    """A fault and the scenario that injects it.

    Attributes:
        name: name of the scenario's function.
        description: what fails, for the report.
        backends: names of the backends that it applies to.
        scenario: starts the run, injects the fault and waits until the run has finished.
        stages: ZeRO stages to draw from.
    """

    name: str
    description: str
    backends: Sequence[str]
    scenario: Scenario
    stages: Sequence[int]


_REGISTRY: list[Fault] = []


def fault(*backends: str, stages: Sequence[int] = (0, 1, 2, 3)) -> Callable[[Scenario], Scenario]:
    """Registers a scenario as a fault; the first line of its docstring is the description."""
    assert set(backends) <= set(BACKENDS), backends

    def register(scenario: Scenario) -> Scenario:
        description = (scenario.__doc__ or "").strip().splitlines()[0].rstrip(".")
        _REGISTRY.append(Fault(scenario.__name__, description, backends, scenario, stages))
        return scenario

    return register


@cache
def all_faults() -> tuple[Fault, ...]:
    """All registered faults."""
    from tests.drill import (  # noqa: F401  (imported to register their faults)
        checkpoint_faults,
        disk_faults,
        host_faults,
        process_faults,
        rank_faults,
        signal_faults,
        slurm_faults,
    )

    return tuple(_REGISTRY)


def draw(
    rng: random.Random, count: int, backends: Sequence[str], only: Sequence[str] | None = None
) -> list[tuple[Fault, str]]:
    """Draws `count` pairs of a fault and a backend.

    No pair repeats before all have been drawn once, and no fault comes under a second backend before every fault has
    been drawn under one.

    Args:
        only: names of faults to draw from; None for all.
    """
    chosen = [fault for fault in all_faults() if only is None or fault.name in only]
    queues = [[(fault, backend) for backend in fault.backends if backend in backends] for fault in chosen]
    for queue in queues:
        rng.shuffle(queue)
    return list(islice(_round_robin(rng, queues), count))


def _round_robin(rng: random.Random, queues: list[list[tuple[Fault, str]]]) -> Iterator[tuple[Fault, str]]:
    nonempty = [queue for queue in queues if queue]
    assert nonempty, "no fault applies to these backends"
    longest = max(len(queue) for queue in nonempty)
    for number in cycle(range(longest)):
        turn = [queue[number] for queue in nonempty if number < len(queue)]
        rng.shuffle(turn)
        yield from turn
