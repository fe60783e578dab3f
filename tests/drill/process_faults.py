"""Process faults: a rank, supervisor or launcher is killed, or hangs."""

import os
import signal
import time

from mixmae.base.exit_codes import FAILED
from tests.drill.drill import EXIT_SECONDS, Drill
from tests.drill.faults import fault
from tests.drill.target import LAST, Target, finish_and_check_cause, start_and_pick_target


@fault("local", "hostfile", "slurm")
def killed_rank(drill: Drill) -> None:
    """SIGKILL of a rank"""
    target = start_and_pick_target(drill)
    drill.inject(f"rank {target.rank} killed after step {target.step}", target.process.kill)
    finish_and_check_cause(drill, target)


@fault("local", "hostfile", "slurm")
def killed_rank_while_saving(drill: Drill) -> None:
    """SIGKILL of a rank while a checkpoint is written"""
    target = start_and_pick_target(drill, last=30)
    step = drill.pause_while_saving(target.process)
    drill.inject(f"rank {target.rank} killed while step {step} was saved", target.process.kill)
    finish_and_check_cause(drill, target)


@fault("local", "hostfile", "slurm")
def killed_rank_while_resuming(drill: Drill) -> None:
    """SIGKILL of a rank, then of one of the next start before its first step"""
    first = start_and_pick_target(drill, first=6)
    drill.inject(f"rank {first.rank} killed after step {first.step}", first.process.kill)
    if drill.max_restarts == 0:
        drill.expect_exit([FAILED], within=EXIT_SECONDS)
        drill.start(drill.max_restarts)
    processes, seconds = drill.ranks(besides=first.processes), drill.rng.uniform(0, 8)
    before = drill.run.training_starts()
    drill.sleep(seconds, unless=lambda: drill.run.training_starts() > before)
    target = Target(drill.random_rank(), first.step, processes)
    drill.inject(f"rank {target.rank} of the next start killed in its first {seconds:.1f} s", target.process.kill)
    finish_and_check_cause(drill, target)


@fault("local", "hostfile", "slurm")
def killed_supervisor(drill: Drill) -> None:
    """SIGKILL of the process that supervises a rank"""
    target = start_and_pick_target(drill)
    supervisor = target.supervisor
    drill.inject(f"the supervisor of rank {target.rank} killed after step {target.step}", supervisor.kill)
    drill.finish()


@fault("local", "hostfile")
def killed_launcher(drill: Drill) -> None:
    """SIGKILL of mixmae launch"""
    _kill_launcher(drill)
    drill.wait_until(lambda: not drill.run.ranks(), "exit of all ranks")
    drill.start()
    drill.finish(user_restarts=0)


@fault("local", "hostfile")
def killed_launcher_and_started_at_once(drill: Drill) -> None:
    """SIGKILL of mixmae launch, and the same command again at once, while ranks may still live"""
    _kill_launcher(drill)
    drill.start()
    drill.finish(user_restarts=0)


def _kill_launcher(drill: Drill) -> None:
    target = start_and_pick_target(drill)
    drill.inject(f"mixmae launch killed after step {target.step}", drill.launcher.kill)
    drill.expect_exit([-signal.SIGKILL])


@fault("local", "hostfile")
def killed_deepspeed(drill: Drill) -> None:
    """SIGKILL of DeepSpeed's launcher beside a rank"""
    target = start_and_pick_target(drill)
    launcher = next(p for p in target.process.parents() if "deepspeed.launcher.launch" in p.cmdline())
    drill.inject(f"DeepSpeed's launcher beside rank {target.rank} killed after step {target.step}", launcher.kill)
    drill.finish()


@fault("hostfile")
def killed_pdsh(drill: Drill) -> None:
    """SIGKILL of pdsh"""
    target = start_and_pick_target(drill)
    drill.inject(f"pdsh killed after step {target.step}", lambda: drill.rig.cluster.login.kill("^pdsh"))
    drill.finish()


@fault("local", "hostfile", "slurm")
def killed_everyone(drill: Drill) -> None:
    """SIGKILL of all ranks at once"""
    target = start_and_pick_target(drill)
    drill.inject(f"all ranks killed after step {target.step}", target.kill_all_ranks)
    drill.finish()


@fault("local", "hostfile", "slurm", stages=(1, 2))
def hanging_rank(drill: Drill) -> None:
    """SIGSTOP of a rank: it hangs, and the others wait for it"""
    target = start_and_pick_target(drill, 2, LAST, "launch.stuck_seconds=20")
    hang = lambda: os.kill(target.process.pid, signal.SIGSTOP)  # noqa: E731
    drill.inject(f"rank {target.rank} stopped after step {target.step}", hang)
    finish_and_check_cause(drill, target, within=None)


@fault("local", "hostfile", stages=(1, 2))
def hanging_supervisor(drill: Drill) -> None:
    """SIGSTOP of the process that supervises a rank, and SIGCONT later"""
    target, seconds = start_and_pick_target(drill, last=10), drill.rng.uniform(1, 30)
    supervisor = target.supervisor.pid
    description = f"the supervisor of rank {target.rank} stopped after step {target.step}, for {seconds:.0f} s"
    drill.inject(description, lambda: os.kill(supervisor, signal.SIGSTOP))
    time.sleep(seconds)
    if any(process.pid == supervisor for process in target.host.processes()):
        os.kill(supervisor, signal.SIGCONT)
    drill.finish()
