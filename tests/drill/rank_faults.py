"""Faults after which the run continues at another world size or ZeRO stage."""

import signal

from mixmae.base.exit_codes import FAILED, PREEMPTED
from tests.drill.drill import EXIT_SECONDS, Drill
from tests.drill.faults import fault
from tests.drill.runs import Backend, Hostfile, Local, SlurmJob
from tests.drill.target import pick_target


@fault("local", stages=(1, 2, 3))
def fewer_ranks_and_back(drill: Drill) -> None:
    """Continued on 1 rank instead of 2, then on 2 again"""
    drill.world_size_changes = True
    drill.start()
    _stop(drill, 6, 25)
    _continue_on(drill, Local(1))
    _kill_a_rank(drill, 31, 48)
    _continue_on(drill, Local(2))
    drill.finish(user_restarts=0)


@fault("hostfile", stages=(1, 2, 3))
def fewer_hosts_and_more(drill: Drill) -> None:
    """Continued on 1 host instead of 2, then on 3"""
    drill.world_size_changes = True
    drill.start()
    _kill_a_rank(drill, 6, 25)
    _continue_on(drill, Hostfile(("node2",)))
    _stop(drill, 31, 48)
    _continue_on(drill, Hostfile(("node1", "node2", "node3")))
    drill.finish(user_restarts=0)


@fault("slurm", stages=(1, 2, 3))
def fewer_nodes_and_more(drill: Drill) -> None:
    """Continued on 1 node instead of 2, then on 3"""
    drill.world_size_changes = True
    drill.start()
    for nodes, (first, last) in ((1, (6, 25)), (3, (31, 48))):
        target = pick_target(drill, first, last)
        drill.inject(f"cancelled after step {target.step}", lambda: drill.slurm.cancel(drill.job))
        drill.expect_exit(range(1, 256))
        _continue_on(drill, SlurmJob(nodes))
    drill.finish(user_restarts=0)


@fault("local", stages=(1, 2, 3))
def other_stage(drill: Drill) -> None:
    """Continued at another ZeRO stage"""
    other = drill.rng.choice([stage for stage in (1, 2, 3) if stage != drill.stage])
    drill.world_size_changes = True
    drill.start()
    _kill_a_rank(drill, 6, 40)
    drill.injected += f", continued at stage {other} instead of {drill.stage}"
    drill.start(0, f"train.zero_stage={other}")
    drill.finish(user_restarts=0)


def _continue_on(drill: Drill, backend: Backend) -> None:
    drill.run.backend = backend
    drill.injected += f", continued on {backend.ranks} rank{'s'[: backend.ranks > 1]}"
    drill.start()


def _stop(drill: Drill, first: int, last: int) -> None:
    """Stops the run with SIGTERM after a step between these."""
    target = pick_target(drill, first, last)
    drill.inject(f"SIGTERM after step {target.step}", lambda: drill.launcher.send_signal(signal.SIGTERM))
    drill.expect_exit([PREEMPTED])


def _kill_a_rank(drill: Drill, first: int, last: int) -> None:
    """Kills a rank after a step between these; expects all ranks to exit and an error that names the killed one."""
    target = pick_target(drill, first, last)
    drill.inject(f"rank {target.rank} killed after step {target.step}", target.process.kill)
    drill.expect_exit([FAILED], f"rank {target.rank} on {target.host.name}", within=EXIT_SECONDS)
    drill.wait_until(lambda: not drill.run.ranks(), "exit of all ranks")
