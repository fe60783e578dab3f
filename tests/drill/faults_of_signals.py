"""Faults: the run is asked to stop, by whom and how often it may be."""

import os
import signal

from mixmae.base.exit_codes import FAILED, PREEMPTED
from tests.drill.drill import Drill
from tests.drill.faults import fault
from tests.drill.target import require_saved, run_to_a_step

_NAMES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@fault("local", "hostfile")
def stopped(drill: Drill) -> None:
    """A signal to mixmae launch that asks it to stop"""
    target, number = run_to_a_step(drill), drill.rng.choice([*_NAMES, signal.SIGINT, signal.SIGHUP])
    act = lambda: drill.launcher.send_signal(number)  # noqa: E731
    drill.strike(f"{number.name} to mixmae launch after step {target.step}", act)
    drill.ended([PREEMPTED], "the same command continues the run")
    require_saved(drill)
    drill.start()
    drill.finish(again=0)


@fault("local", "hostfile")
def stopped_twice(drill: Drill) -> None:
    """SIGTERM to mixmae launch, and once more"""
    target, apart = run_to_a_step(drill), drill.rng.uniform(0, 0.3)

    def twice() -> None:
        drill.launcher.send_signal(signal.SIGTERM)
        drill.pause(apart)
        drill.launcher.send_signal(signal.SIGTERM)

    drill.strike(f"SIGTERM twice, {apart * 1000:.0f} ms apart, to mixmae launch after step {target.step}", twice)
    drill.ended([FAILED, PREEMPTED], within=20)
    drill.start()
    drill.finish(again=0)


@fault("local", "hostfile")
def stopped_while_starting(drill: Drill) -> None:
    """SIGTERM to mixmae launch before the first step"""
    seconds = drill.rng.uniform(0, 12)
    drill.start()
    drill.pause(seconds, unless=lambda: drill.run.begins() > 0)
    act = lambda: drill.launcher.send_signal(signal.SIGTERM)  # noqa: E731
    drill.strike(f"SIGTERM to mixmae launch {seconds:.1f} s after its start", act)
    drill.ended([PREEMPTED])
    drill.start()
    drill.finish(again=0)


@fault("local", "hostfile", "slurm")
def signalled_rank(drill: Drill) -> None:
    """A signal to one rank that asks it to stop: all save and end together"""
    target, number = run_to_a_step(drill), drill.rng.choice(_NAMES)
    act = lambda: os.kill(target.process.pid, number)  # noqa: E731
    drill.strike(f"{number.name} to rank {target.rank} after step {target.step}", act)
    drill.finish()
    require_saved(drill)


@fault("local", "hostfile", "slurm")
def signalled_rank_twice(drill: Drill) -> None:
    """SIGTERM to one rank, and once more while it saves"""
    target, apart = run_to_a_step(drill), drill.rng.uniform(0, 0.1)

    def twice() -> None:
        os.kill(target.process.pid, signal.SIGTERM)
        drill.pause(apart)
        os.kill(target.process.pid, signal.SIGTERM)

    drill.strike(f"SIGTERM twice, {apart * 1000:.0f} ms apart, to rank {target.rank} after step {target.step}", twice)
    drill.finish()
    require_saved(drill)


@fault("local", "hostfile", "slurm")
def signalled_supervisor(drill: Drill) -> None:
    """A signal to one rank's supervisor, as DeepSpeed's launcher or Slurm sends it"""
    target, number = run_to_a_step(drill), drill.rng.choice(_NAMES)
    supervisor = target.supervisor
    act = lambda: supervisor.send_signal(number)  # noqa: E731
    drill.strike(f"{number.name} to the supervisor of rank {target.rank} after step {target.step}", act)
    drill.finish()
    require_saved(drill)
