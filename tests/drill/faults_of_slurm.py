"""Faults: what Slurm's users, administrators and daemons do to a job."""

import signal

from tests.drill.drill import Drill
from tests.drill.faults import fault
from tests.drill.target import require_saved, run_to_a_step

_ENDING = (signal.SIGTERM, signal.SIGKILL)


@fault("slurm")
def requeued(drill: Drill) -> None:
    """scontrol requeue"""
    target = run_to_a_step(drill)
    drill.strike(f"requeued after step {target.step}", lambda: drill.slurm.requeue(drill.job))
    drill.finish(again=0)


@fault("slurm")
def cancelled(drill: Drill) -> None:
    """scancel, and the job is submitted again"""
    target = run_to_a_step(drill)
    drill.strike(f"cancelled after step {target.step}", lambda: drill.slurm.cancel(drill.job))
    drill.ended(range(1, 256))
    require_saved(drill)
    drill.start(drill.restarts)
    drill.finish(again=0)


@fault("slurm")
def preempted(drill: Drill) -> None:
    """A signal to all ranks, as Slurm sends before it preempts"""
    target, name = run_to_a_step(drill), drill.rng.choice(["TERM", "USR1", "USR2"])
    act = lambda: drill.slurm.cancel(drill.job, f"--signal={name}")  # noqa: E731
    drill.strike(f"scancel --signal={name} after step {target.step}", act)
    drill.finish(again=0)
    require_saved(drill)


@fault("slurm")
def warned(drill: Drill) -> None:
    """SIGUSR1 to the batch script, as Slurm sends before the job's time is over"""
    target = run_to_a_step(drill)
    act = lambda: drill.slurm.cancel(drill.job, "--batch", "--signal=USR1")  # noqa: E731
    drill.strike(f"scancel --batch --signal=USR1 after step {target.step}", act)
    drill.finish(again=0)
    require_saved(drill)


@fault("slurm")
def node_set_down(drill: Drill) -> None:
    """An administrator sets a node down, and takes it back"""
    target, seconds = run_to_a_step(drill), drill.rng.uniform(0, 10)
    act = lambda: drill.slurm.down(target.host)  # noqa: E731
    drill.strike(f"node of rank {target.rank} set down after step {target.step}, for {seconds:.0f} s", act)
    drill.pause(seconds)
    drill.slurm.resume(target.host)
    drill.finish(again=0)


@fault("slurm")
def controller_restarted(drill: Drill) -> None:
    """slurmctld ends and is started again some seconds later"""
    target, number, seconds = run_to_a_step(drill, last=30), drill.rng.choice(_ENDING), drill.rng.uniform(0, 10)
    description = f"slurmctld ended by {number.name} after step {target.step}, started {seconds:.0f} s later"
    drill.strike(description, lambda: drill.slurm.stop_controller(number))
    drill.pause(seconds)
    drill.slurm.start_controller()
    drill.finish(again=0)


@fault("slurm")
def daemon_restarted(drill: Drill) -> None:
    """slurmd of a node ends and is started again some seconds later"""
    target, number, seconds = run_to_a_step(drill, last=30), drill.rng.choice(_ENDING), drill.rng.uniform(0, 10)
    description = f"slurmd of rank {target.rank}'s node ended by {number.name} after step {target.step}"
    drill.strike(f"{description}, started {seconds:.0f} s later", lambda: drill.slurm.stop_daemon(target.host, number))
    drill.pause(seconds)
    drill.slurm.start_daemon(target.host)
    drill.finish(again=0)


@fault("slurm")
def killed_batch_script(drill: Drill) -> None:
    """SIGKILL of the batch script"""
    _kill(drill, "slurm_script", "the batch script")


@fault("slurm")
def killed_srun(drill: Drill) -> None:
    """SIGKILL of srun"""
    _kill(drill, "^srun ", "srun")


@fault("slurm")
def killed_step_daemon(drill: Drill) -> None:
    """SIGKILL of the slurmstepd that holds a rank"""
    target = run_to_a_step(drill)
    holder = next(process for process in target.process.parents() if process.name() == "slurmstepd")
    drill.strike(f"slurmstepd of rank {target.rank} killed after step {target.step}", holder.kill)
    drill.finish()


def _kill(drill: Drill, pattern: str, what: str) -> None:
    target = run_to_a_step(drill)
    hosts = drill.rig.cluster.hosts
    drill.strike(f"{what} killed after step {target.step}", lambda: [host.kill(pattern) for host in hosts])
    drill.finish()
