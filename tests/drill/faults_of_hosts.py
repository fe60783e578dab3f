"""Faults: a host is out of reach, without power, or has another time."""

from tests.cluster import clock
from tests.cluster.host import Host
from tests.drill.drill import Drill
from tests.drill.faults import fault
from tests.drill.runs import Batch, Local
from tests.drill.target import run_to_a_step

_SHORT, _LONG = (2.0, 12.0), (25.0, 40.0)
"""Seconds: shorter and longer than the 20 after which a supervisor that is not heard is given up."""


@fault("hostfile", "slurm", stages=(1, 2))
def cut_link(drill: Drill) -> None:
    """A host's link is cut for longer than the run waits for it"""
    _cut(drill, _LONG)


@fault("hostfile", "slurm", stages=(1, 2))
def cut_link_for_a_moment(drill: Drill) -> None:
    """A host's link is cut for some seconds"""
    _cut(drill, _SHORT)


def _cut(drill: Drill, bounds: tuple[float, float]) -> None:
    target, seconds = run_to_a_step(drill), drill.rng.uniform(*bounds)
    host = target.host
    drill.strike(f"link of rank {target.rank}'s host cut after step {target.step}, for {seconds:.0f} s", host.cut)
    drill.pause(seconds)
    host.restore()
    _back_in_slurm(drill, host)
    drill.finish()


@fault("local", "hostfile", "slurm", stages=(1, 2))
def power_off(drill: Drill) -> None:
    """A host loses its power, and comes back later"""
    target, seconds = run_to_a_step(drill), drill.rng.uniform(1, 30)
    host = target.host
    drill.strike(f"rank {target.rank}'s host off after step {target.step}, for {seconds:.0f} s", host.power_off)
    drill.pause(seconds)
    drill.rig.cluster.power_on(host)
    _back_in_slurm(drill, host)
    if isinstance(drill.backend, Local):
        drill.ended([-9])
        drill.start()
    drill.finish()


@fault("hostfile", "slurm")
def wrong_clock(drill: Drill) -> None:
    """The clock of one host is hours off until the run is started again"""
    name, hours = drill.rng.choice(["node1", "node2"]), drill.rng.choice([-26, -3, 3, 26])
    host = drill.rig.cluster.host(name)
    clock.set_off(host, 3600 * hours)
    target = run_to_a_step(drill)

    def act() -> None:
        clock.set_right(host)
        target.kill_everyone()

    drill.strike(f"clock of {name} {hours:+d} h, right again when all ranks are killed after step {target.step}", act)
    drill.finish()


@fault("slurm")
def clock_past_the_limit(drill: Drill) -> None:
    """The clock of one node is behind or past the end of the job's time"""
    drill.run.backend = Batch(nodes=2, limit="20")
    name, hours = drill.rng.choice(["node1", "node2"]), drill.rng.choice([-3, 3])
    clock.set_off(drill.rig.cluster.host(name), 3600 * hours)
    drill.strike(f"clock of {name} {hours:+d} h, the job has 20 min", lambda: None)
    drill.start(3)
    drill.finish(again=0)


def _back_in_slurm(drill: Drill, host: Host) -> None:
    """Has a node that was out of reach register at once; by itself it takes minutes."""
    slurm = drill.slurm
    if "NOT_RESPONDING" in (state := slurm.node_state(host)) or "DOWN" in state:
        slurm.restart_daemon(host)
