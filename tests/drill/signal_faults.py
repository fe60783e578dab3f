"""Signal faults: a stop signal, once or twice, to the launcher, a rank or a supervisor."""

import os
import signal

from mixmae.base.exit_codes import FAILED, PREEMPTED
from tests.drill.drill import Drill
from tests.drill.faults import fault
from tests.drill.target import require_saved_on_stop, start_and_pick_target

_NAMES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@fault("local", "hostfile")
def stopped(drill: Drill) -> None:
    """A signal to mixmae launch that asks it to stop"""
    target, number = start_and_pick_target(drill), drill.rng.choice([*_NAMES, signal.SIGINT, signal.SIGHUP])
    send = lambda: drill.launcher.send_signal(number)  # noqa: E731
    drill.inject(f"{number.name} to mixmae launch after step {target.step}", send)
    drill.expect_exit([PREEMPTED], "the same command continues the run")
    require_saved_on_stop(drill)
    drill.start()
    drill.finish(user_restarts=0)


@fault("local", "hostfile")
def stopped_twice(drill: Drill) -> None:
    """SIGTERM to mixmae launch, and once more"""
    target, apart = start_and_pick_target(drill), drill.rng.uniform(0, 0.3)

    def twice() -> None:
        drill.launcher.send_signal(signal.SIGTERM)
        drill.sleep(apart)
        drill.launcher.send_signal(signal.SIGTERM)

    drill.inject(f"SIGTERM twice, {apart * 1000:.0f} ms apart, to mixmae launch after step {target.step}", twice)
    drill.expect_exit([FAILED, PREEMPTED], within=20)
    drill.start()
    drill.finish(user_restarts=0)


@fault("local", "hostfile")
def stopped_while_starting(drill: Drill) -> None:
    """SIGTERM to mixmae launch before the first step"""
    seconds = drill.rng.uniform(0, 12)
    drill.start()
    drill.sleep(seconds, unless=lambda: drill.run.training_starts() > 0)
    send = lambda: drill.launcher.send_signal(signal.SIGTERM)  # noqa: E731
    drill.inject(f"SIGTERM to mixmae launch {seconds:.1f} s after its start", send)
    drill.expect_exit([PREEMPTED])
    drill.start()
    drill.finish(user_restarts=0)


@fault("local", "hostfile", "slurm")
def signalled_rank(drill: Drill) -> None:
    """A signal to one rank that asks it to stop: all save and end together"""
    target, number = start_and_pick_target(drill), drill.rng.choice(_NAMES)
    send = lambda: os.kill(target.process.pid, number)  # noqa: E731
    drill.inject(f"{number.name} to rank {target.rank} after step {target.step}", send)
    drill.finish()
    require_saved_on_stop(drill)


@fault("local", "hostfile", "slurm")
def signalled_rank_twice(drill: Drill) -> None:
    """SIGTERM to one rank, and once more while it saves"""
    target, apart = start_and_pick_target(drill), drill.rng.uniform(0, 0.1)

    def twice() -> None:
        os.kill(target.process.pid, signal.SIGTERM)
        drill.sleep(apart)
        os.kill(target.process.pid, signal.SIGTERM)

    drill.inject(f"SIGTERM twice, {apart * 1000:.0f} ms apart, to rank {target.rank} after step {target.step}", twice)
    drill.finish()
    require_saved_on_stop(drill)


@fault("local", "hostfile", "slurm")
def signalled_supervisor(drill: Drill) -> None:
    """A signal to one rank's supervisor, as DeepSpeed's launcher or Slurm sends it"""
    target, number = start_and_pick_target(drill), drill.rng.choice(_NAMES)
    supervisor = target.supervisor
    send = lambda: supervisor.send_signal(number)  # noqa: E731
    drill.inject(f"{number.name} to the supervisor of rank {target.rank} after step {target.step}", send)
    drill.finish()
    require_saved_on_stop(drill)
