"""Slurm faults: jobs requeued, cancelled, preempted; nodes and daemons down; Slurm's processes killed."""

import signal

from tests.drill.drill import Drill
from tests.drill.faults import fault
from tests.drill.target import require_saved_on_stop, start_and_pick_target

_SIGNALS = (signal.SIGTERM, signal.SIGKILL)


@fault("slurm")
def requeued(drill: Drill) -> None:
    """scontrol requeue"""
    target = start_and_pick_target(drill)
    drill.inject(f"requeued after step {target.step}", lambda: drill.slurm.requeue(drill.job))
    drill.finish(user_restarts=0)


@fault("slurm")
def cancelled(drill: Drill) -> None:
    """scancel, and the job is submitted again"""
    target = start_and_pick_target(drill)
    drill.inject(f"cancelled after step {target.step}", lambda: drill.slurm.cancel(drill.job))
    drill.expect_exit(range(1, 256))
    require_saved_on_stop(drill)
    drill.start(drill.max_restarts)
    drill.finish(user_restarts=0)


@fault("slurm")
def preempted(drill: Drill) -> None:
    """A signal to all ranks, as Slurm sends before it preempts"""
    target, name = start_and_pick_target(drill), drill.rng.choice(["TERM", "USR1", "USR2"])
    send = lambda: drill.slurm.cancel(drill.job, f"--signal={name}")  # noqa: E731
    drill.inject(f"scancel --signal={name} after step {target.step}", send)
    drill.finish(user_restarts=0)
    require_saved_on_stop(drill)


@fault("slurm")
def warned(drill: Drill) -> None:
    """SIGUSR1 to the batch script, as Slurm sends before the job's time is over"""
    target = start_and_pick_target(drill)
    send = lambda: drill.slurm.cancel(drill.job, "--batch", "--signal=USR1")  # noqa: E731
    drill.inject(f"scancel --batch --signal=USR1 after step {target.step}", send)
    drill.finish(user_restarts=0)
    require_saved_on_stop(drill)


@fault("slurm")
def node_set_down(drill: Drill) -> None:
    """An administrator sets a node down, and takes it back"""
    target, seconds = start_and_pick_target(drill), drill.rng.uniform(0, 10)
    set_down = lambda: drill.slurm.down(target.host)  # noqa: E731
    drill.inject(f"node of rank {target.rank} set down after step {target.step}, for {seconds:.0f} s", set_down)
    drill.sleep(seconds)
    drill.slurm.resume(target.host)
    drill.finish(user_restarts=0)


@fault("slurm")
def controller_restarted(drill: Drill) -> None:
    """slurmctld ends and is started again some seconds later"""
    target, number, seconds = (
        start_and_pick_target(drill, last=30),
        drill.rng.choice(_SIGNALS),
        drill.rng.uniform(0, 10),
    )
    description = f"slurmctld ended by {number.name} after step {target.step}, started {seconds:.0f} s later"
    drill.inject(description, lambda: drill.slurm.stop_controller(number))
    drill.sleep(seconds)
    drill.slurm.start_controller()
    drill.finish(user_restarts=0)


@fault("slurm")
def daemon_restarted(drill: Drill) -> None:
    """slurmd of a node ends and is started again some seconds later"""
    target, number, seconds = (
        start_and_pick_target(drill, last=30),
        drill.rng.choice(_SIGNALS),
        drill.rng.uniform(0, 10),
    )
    description = f"slurmd of rank {target.rank}'s node ended by {number.name} after step {target.step}"
    drill.inject(f"{description}, started {seconds:.0f} s later", lambda: drill.slurm.stop_daemon(target.host, number))
    drill.sleep(seconds)
    drill.slurm.start_daemon(target.host)
    drill.finish(user_restarts=0)


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
    target = start_and_pick_target(drill)
    holder = next(process for process in target.process.parents() if process.name() == "slurmstepd")
    drill.inject(f"slurmstepd of rank {target.rank} killed after step {target.step}", holder.kill)
    drill.finish()


def _kill(drill: Drill, pattern: str, what: str) -> None:
    target = start_and_pick_target(drill)
    hosts = drill.rig.cluster.hosts
    drill.inject(f"{what} killed after step {target.step}", lambda: [host.kill(pattern) for host in hosts])
    drill.finish()
