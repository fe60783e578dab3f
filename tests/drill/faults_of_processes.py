"""Faults: a process is killed, or hangs."""

import os
import signal
import time

from mixmae.base.exit_codes import FAILED
from tests.drill.drill import END_SECONDS, Drill
from tests.drill.faults import fault
from tests.drill.target import LAST, Target, finish_naming, run_to_a_step


@fault("local", "hostfile", "slurm")
def killed_rank(drill: Drill) -> None:
    """SIGKILL of a rank"""
    target = run_to_a_step(drill)
    drill.strike(f"rank {target.rank} killed after step {target.step}", target.process.kill)
    finish_naming(drill, target)


@fault("local", "hostfile", "slurm")
def killed_rank_while_saving(drill: Drill) -> None:
    """SIGKILL of a rank while a checkpoint is written"""
    target = run_to_a_step(drill, last=30)
    step = drill.catch_saving(target.process)
    drill.strike(f"rank {target.rank} killed while step {step} was saved", target.process.kill)
    finish_naming(drill, target)


@fault("local", "hostfile", "slurm")
def killed_rank_while_resuming(drill: Drill) -> None:
    """SIGKILL of a rank, then of one of the next start before its first step"""
    first = run_to_a_step(drill, first=6)
    drill.strike(f"rank {first.rank} killed after step {first.step}", first.process.kill)
    if drill.restarts == 0:
        drill.ended([FAILED], within=END_SECONDS)
        drill.start(drill.restarts)
    everyone, begins, seconds = drill.ranks(besides=first.everyone), drill.run.begins(), drill.rng.uniform(0, 8)
    drill.pause(seconds, unless=lambda: drill.run.begins() > begins)
    target = Target(drill.any_rank(), first.step, everyone)
    drill.strike(f"rank {target.rank} of the next start killed in its first {seconds:.1f} s", target.process.kill)
    finish_naming(drill, target)


@fault("local", "hostfile", "slurm")
def killed_supervisor(drill: Drill) -> None:
    """SIGKILL of the process that supervises a rank"""
    target = run_to_a_step(drill)
    supervisor = target.supervisor
    drill.strike(f"the supervisor of rank {target.rank} killed after step {target.step}", supervisor.kill)
    drill.finish()


@fault("local", "hostfile")
def killed_launcher(drill: Drill) -> None:
    """SIGKILL of mixmae launch"""
    _kill_launcher(drill)
    drill.until(lambda: not drill.run.ranks(), "end of all ranks")
    drill.start()
    drill.finish(again=0)


@fault("local", "hostfile")
def killed_launcher_and_started_at_once(drill: Drill) -> None:
    """SIGKILL of mixmae launch, and the same command again at once, while ranks may still live"""
    _kill_launcher(drill)
    drill.start()
    drill.finish(again=0)


def _kill_launcher(drill: Drill) -> None:
    target = run_to_a_step(drill)
    drill.strike(f"mixmae launch killed after step {target.step}", drill.launcher.kill)
    drill.ended([-signal.SIGKILL])


@fault("local", "hostfile")
def killed_deepspeed(drill: Drill) -> None:
    """SIGKILL of DeepSpeed's launcher beside a rank"""
    target = run_to_a_step(drill)
    launcher = next(p for p in target.process.parents() if "deepspeed.launcher.launch" in p.cmdline())
    drill.strike(f"DeepSpeed's launcher beside rank {target.rank} killed after step {target.step}", launcher.kill)
    drill.finish()


@fault("hostfile")
def killed_pdsh(drill: Drill) -> None:
    """SIGKILL of pdsh"""
    target = run_to_a_step(drill)
    drill.strike(f"pdsh killed after step {target.step}", lambda: drill.rig.cluster.login.kill("^pdsh"))
    drill.finish()


@fault("local", "hostfile", "slurm")
def killed_everyone(drill: Drill) -> None:
    """SIGKILL of all ranks at once"""
    target = run_to_a_step(drill)
    drill.strike(f"all ranks killed after step {target.step}", target.kill_everyone)
    drill.finish()


@fault("local", "hostfile", "slurm", stages=(1, 2))
def hanging_rank(drill: Drill) -> None:
    """SIGSTOP of a rank: it hangs, and the others wait for it"""
    target = run_to_a_step(drill, 2, LAST, "launch.stuck_seconds=20")
    act = lambda: os.kill(target.process.pid, signal.SIGSTOP)  # noqa: E731
    drill.strike(f"rank {target.rank} stopped after step {target.step}", act)
    finish_naming(drill, target, within=None)


@fault("local", "hostfile", stages=(1, 2))
def hanging_supervisor(drill: Drill) -> None:
    """SIGSTOP of the process that supervises a rank, and SIGCONT later"""
    target, seconds = run_to_a_step(drill, last=10), drill.rng.uniform(1, 30)
    supervisor = target.supervisor.pid
    description = f"the supervisor of rank {target.rank} stopped after step {target.step}, for {seconds:.0f} s"
    drill.strike(description, lambda: os.kill(supervisor, signal.SIGSTOP))
    time.sleep(seconds)
    if any(process.pid == supervisor for process in target.host.processes()):
        os.kill(supervisor, signal.SIGCONT)
    drill.finish()
