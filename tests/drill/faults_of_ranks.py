"""Faults after which the run goes on with another number of ranks."""

import signal

from mixmae.base.exit_codes import FAILED, PREEMPTED
from tests.drill.drill import END_SECONDS, Drill
from tests.drill.faults import fault
from tests.drill.runs import Backend, Batch, Local, OnHosts
from tests.drill.target import seen_at_a_step


@fault("local", stages=(1, 2, 3))
def fewer_ranks_and_back(drill: Drill) -> None:
    """Continued on 1 rank instead of 2, then on 2 again"""
    drill.moves = True
    drill.start()
    _stop(drill, 6, 25)
    _go_on(drill, Local(1))
    _kill_a_rank(drill, 31, 48)
    _go_on(drill, Local(2))
    drill.finish(again=0)


@fault("hostfile", stages=(1, 2, 3))
def fewer_hosts_and_more(drill: Drill) -> None:
    """Continued on 1 host instead of 2, then on 3"""
    drill.moves = True
    drill.start()
    _kill_a_rank(drill, 6, 25)
    _go_on(drill, OnHosts(("node2",)))
    _stop(drill, 31, 48)
    _go_on(drill, OnHosts(("node1", "node2", "node3")))
    drill.finish(again=0)


@fault("slurm", stages=(1, 2, 3))
def fewer_nodes_and_more(drill: Drill) -> None:
    """Continued on 1 node instead of 2, then on 3"""
    drill.moves = True
    drill.start()
    for nodes, (first, last) in ((1, (6, 25)), (3, (31, 48))):
        target = seen_at_a_step(drill, first, last)
        drill.strike(f"cancelled after step {target.step}", lambda: drill.slurm.cancel(drill.job))
        drill.ended(range(1, 256))
        _go_on(drill, Batch(nodes))
    drill.finish(again=0)


@fault("local", stages=(1, 2, 3))
def other_stage(drill: Drill) -> None:
    """Continued at another ZeRO stage"""
    other = drill.rng.choice([stage for stage in (1, 2, 3) if stage != drill.stage])
    drill.moves = True
    drill.start()
    _kill_a_rank(drill, 6, 40)
    drill.done += f", continued at stage {other} instead of {drill.stage}"
    drill.start(0, f"train.zero_stage={other}")
    drill.finish(again=0)


def _go_on(drill: Drill, backend: Backend) -> None:
    drill.run.backend = backend
    drill.done += f", continued on {backend.ranks} rank{'s'[: backend.ranks > 1]}"
    drill.start()


def _stop(drill: Drill, first: int, last: int) -> None:
    """The run is asked to stop after a step between these, and does."""
    target = seen_at_a_step(drill, first, last)
    drill.strike(f"SIGTERM after step {target.step}", lambda: drill.launcher.send_signal(signal.SIGTERM))
    drill.ended([PREEMPTED])


def _kill_a_rank(drill: Drill, first: int, last: int) -> None:
    """A rank is killed after a step between these, and the run ends everywhere, naming it."""
    target = seen_at_a_step(drill, first, last)
    drill.strike(f"rank {target.rank} killed after step {target.step}", target.process.kill)
    drill.ended([FAILED], f"rank {target.rank} on {target.host.name}", within=END_SECONDS)
    drill.until(lambda: not drill.run.ranks(), "end of all ranks")
