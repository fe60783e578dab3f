"""The configuration of Slurm and munge for the cluster's hosts."""

import secrets
from pathlib import Path

from tests.cluster.network import LOGIN

GPU = "/run/slurm/gpu"
"""Path prefix of the device files that represent GPUs; their number follows."""

# cred_expire is also how long a requeued job waits before it may start again.
_SLURM = """\
ClusterName=test
SlurmctldHost={login}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
StateSaveLocation=/run/slurm/state
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmdSpoolDir=/run/slurm/spool
SlurmctldLogFile={log}/{login}/slurmctld.log
SlurmdLogFile={log}/%h/slurmd.log
TaskProlog=/etc/slurm/task_prolog
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
SlurmdTimeout=15
TCPTimeout=2
MinJobAge=86400
ReturnToService=1
GresTypes=gpu
NodeName=node[1-{hosts}] CPUs={cpus} Gres=gpu:{slots}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE
"""

_CGROUP = "CgroupPlugin=cgroup/v1\n"
_PROLOG = "#!/bin/sh\n[ ! -e /run/slurm/environment ] || sed 's/^/export /' /run/slurm/environment\n"


def configure(folder: Path, log: Path, hosts: int, slots: int) -> None:
    """Writes the configuration, with `slots` GPUs per host; the folder becomes every host's /etc/slurm."""
    folder.mkdir()
    values = {"login": LOGIN, "log": log, "hosts": hosts, "slots": slots, "cpus": max(4, 2 * slots)}
    (folder / "slurm.conf").write_text(_SLURM.format(**values))
    (folder / "gres.conf").write_text(f"Name=gpu File={GPU}[0-{slots - 1}]\n")
    (folder / "cgroup.conf").write_text(_CGROUP)
    (folder / "task_prolog").write_text(_PROLOG)
    (folder / "task_prolog").chmod(0o755)


def configure_munge(folder: Path) -> None:
    """Generates a key; the folder becomes every host's /etc/munge."""
    folder.mkdir(mode=0o700)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
