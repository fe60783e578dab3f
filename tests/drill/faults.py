"""The list of faults, and what of it a drill gets by lot."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice

from tests.drill.drill import Drill
from tests.drill.runs import Backend, Batch, Local, OnHosts

BACKENDS: dict[str, Backend] = {
    "local": Local(2),
    "hostfile": OnHosts(("node1", "node2")),
    "slurm": Batch(nodes=2),
}
Script = Callable[[Drill], None]


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run.

    Attributes:
        name: of the function that plays it.
        description: what happens.
        backends: of starting a run in which it can happen.
        play: takes a run that was not started to its end.
        stages: ZeRO stages at which it is of interest.
    """

    name: str
    description: str
    backends: Sequence[str]
    play: Script
    stages: Sequence[int]


_FOUND: list[Fault] = []


def fault(*backends: str, stages: Sequence[int] = (0, 1, 2, 3)) -> Callable[[Script], Script]:
    """Puts a function on the list; the first line of its docstring says what happens."""
    assert set(backends) <= set(BACKENDS), backends

    def put(play: Script) -> Script:
        description = (play.__doc__ or "").strip().splitlines()[0].rstrip(".")
        _FOUND.append(Fault(play.__name__, description, backends, play, stages))
        return play

    return put


@cache
def all_faults() -> tuple[Fault, ...]:
    """Every fault there is."""
    from tests.drill import (  # noqa: F401  (each puts its own on the list)
        faults_of_checkpoints,
        faults_of_disks,
        faults_of_hosts,
        faults_of_processes,
        faults_of_ranks,
        faults_of_signals,
        faults_of_slurm,
    )

    return tuple(_FOUND)


def draw(
    rng: random.Random, count: int, backends: Sequence[str], only: Sequence[str] | None = None
) -> list[tuple[Fault, str]]:
    """So many pairs of a fault and a backend.

    Every pair comes once before any comes twice, and if there are fewer than pairs, every fault comes once before any
    comes in a second backend.

    Args:
        only: names of faults; None for all.
    """
    chosen = [fault for fault in all_faults() if only is None or fault.name in only]
    queues = [[(fault, backend) for backend in fault.backends if backend in backends] for fault in chosen]
    for queue in queues:
        rng.shuffle(queue)
    return list(islice(_deal(rng, queues), count))


def _deal(rng: random.Random, queues: list[list[tuple[Fault, str]]]) -> Iterator[tuple[Fault, str]]:
    full = [queue for queue in queues if queue]
    assert full, "no fault can happen under these backends"
    most = max(len(queue) for queue in full)
    for number in cycle(range(most)):
        row = [queue[number] for queue in full if number < len(queue)]
        rng.shuffle(row)
        yield from row
