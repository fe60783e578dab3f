"""Host faults: a host is unreachable, powered off, or its clock is wrong."""

from tests.cluster import clock
from tests.cluster.host import Host
from tests.drill.drill import Drill
from tests.drill.faults import fault
from tests.drill.runs import Local, SlurmJob
from tests.drill.target import start_and_pick_target

_SHORT, _LONG = (2.0, 12.0), (25.0, 40.0)
"""Seconds: below and above the 20 s heartbeat timeout of supervisors."""


@fault("hostfile", "slurm", stages=(1, 2))
def cut_link(drill: Drill) -> None:
    """A host's link is cut for longer than the run waits for it"""
    _cut(drill, _LONG)


@fault("hostfile", "slurm", stages=(1, 2))
def cut_link_for_a_moment(drill: Drill) -> None:
    """A host's link is cut for some seconds"""
    _cut(drill, _SHORT)


def _cut(drill: Drill, bounds: tuple[float, float]) -> None:
    target, seconds = start_and_pick_target(drill), drill.rng.uniform(*bounds)
    host = target.host
    description = f"link of rank {target.rank}'s host cut after step {target.step}, for {seconds:.0f} s"
    drill.inject(description, host.disconnect)
    drill.sleep(seconds)
    host.reconnect()
    _reregister_in_slurm(drill, host)
    drill.finish()


@fault("local", "hostfile", "slurm", stages=(1, 2))
def power_off(drill: Drill) -> None:
    """A host loses its power, and comes back later"""
    target, seconds = start_and_pick_target(drill), drill.rng.uniform(1, 30)
    host = target.host
    drill.inject(f"rank {target.rank}'s host off after step {target.step}, for {seconds:.0f} s", host.power_off)
    drill.sleep(seconds)
    drill.rig.cluster.power_on(host)
    _reregister_in_slurm(drill, host)
    if isinstance(drill.backend, Local):
        drill.expect_exit([-9])
        drill.start()
    drill.finish()


@fault("hostfile", "slurm")
def wrong_clock(drill: Drill) -> None:
    """The clock of one host is hours off until the run is started again"""
    name, hours = drill.rng.choice(["node1", "node2"]), drill.rng.choice([-26, -3, 3, 26])
    host = drill.rig.cluster.host(name)
    clock.set_offset(host, 3600 * hours)
    target = start_and_pick_target(drill)

    def repair_and_kill() -> None:
        clock.clear_offset(host)
        target.kill_all_ranks()

    description = f"clock of {name} {hours:+d} h, right again when all ranks are killed after step {target.step}"
    drill.inject(description, repair_and_kill)
    drill.finish()


@fault("slurm")
def clock_past_the_limit(drill: Drill) -> None:
    """The clock of one node is behind or past the end of the job's time"""
    drill.run.backend = SlurmJob(nodes=2, limit="20")
    name, hours = drill.rng.choice(["node1", "node2"]), drill.rng.choice([-3, 3])
    clock.set_offset(drill.rig.cluster.host(name), 3600 * hours)
    drill.inject(f"clock of {name} {hours:+d} h, the job has 20 min", lambda: None)
    drill.start(3)
    drill.finish(user_restarts=0)


def _reregister_in_slurm(drill: Drill, host: Host) -> None:
    """Makes a node that was unreachable register at once; without this it takes minutes."""
    slurm = drill.slurm
    if "NOT_RESPONDING" in (state := slurm.node_state(host)) or "DOWN" in state:
        slurm.restart_daemon(host)
