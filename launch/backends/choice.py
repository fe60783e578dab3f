"""Where ranks are started, as a command line says it: here, on the hosts of a hostfile, or as a job of Slurm."""

import argparse
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.launch.backends import slurm
from mixmae.launch.backends.hostfile import OnHosts, master_address
from mixmae.launch.backends.hosts import read_hostfile, select
from mixmae.launch.backends.local import Local

_OF_WAY = {
    "hostfile": ("include", "exclude", "ranks", "master_addr", "ssh_port"),
    "slurm": (
        *("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_rank", "job_name", "time"),
        *("partition", "account", "qos", "array", "site"),
    ),
}


def add_ways(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds `--local`, `--hostfile`, `--slurm` and what goes with each."""
    ways = parser.add_mutually_exclusive_group(required=required)
    ways.add_argument("--local", type=int, metavar="N", help="N ranks on this machine, one per accelerator")
    ways.add_argument("--hostfile", type=Path, metavar="FILE", help="lines such as 'node1 slots=8'; needs pdsh and ssh")
    ways.add_argument("--slurm", action="store_true", help="submit a batch job")
    hosts = parser.add_argument_group("with --hostfile")
    hosts.add_argument("--include", metavar="HOSTS", help="only these: node1@node2:0,1")
    hosts.add_argument("--exclude", metavar="HOSTS", help="all but these")
    hosts.add_argument("--ranks", type=int, metavar="N", help="refuse to start any other number")
    hosts.add_argument("--master-addr", metavar="ADDRESS", help="at which all hosts reach the first one")
    hosts.add_argument("--ssh-port", type=int, metavar="PORT")
    job = parser.add_argument_group("with --slurm")
    job.add_argument("--nodes", type=int, metavar="N", help="default 1")
    sizes = job.add_mutually_exclusive_group()
    sizes.add_argument("--gpus-per-node", type=int, metavar="N", help="one rank each")
    sizes.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks on CPUs, without GPUs")
    job.add_argument("--cpus-per-rank", type=int, metavar="N")
    job.add_argument("--job-name", metavar="NAME", help="default: the run directory's")
    job.add_argument("--time", metavar="LIMIT", help="such as 1-00:00:00")
    for name in ("partition", "account", "qos"):
        job.add_argument(f"--{name}", metavar="NAME")
    job.add_argument("--site", type=Path, metavar="FILE", help="modules, variables, container: docs/launching.md")


def require_fitting(args: argparse.Namespace) -> None:
    """Raises UsageError where an option belongs to another way of starting than was chosen."""
    chosen = "slurm" if args.slurm else "hostfile" if args.hostfile else "local"
    for way, names in _OF_WAY.items():
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name, None) is not None]
        if given and way != chosen:
            raise UsageError(f"{', '.join(given)} goes with --{way}, not with --{chosen}")


def local(ranks: int) -> Local:
    """Ranks on this machine.

    Raises:
        UsageError: there are to be none.
    """
    if ranks < 1:
        raise UsageError(f"--local {ranks}: expected 1 or more ranks")
    return Local(ranks)


def on_hosts(args: argparse.Namespace) -> OnHosts:
    """Ranks on the hosts of a hostfile.

    Raises:
        UsageError: the hostfile, or what is chosen of it, is not as it should be.
    """
    hosts = select(read_hostfile(args.hostfile), args.include or "", args.exclude or "")
    if args.ranks is not None and hosts.ranks != args.ranks:
        raise UsageError(
            f"--ranks {args.ranks}, but {args.hostfile} gives {hosts.ranks} on {len(hosts.slots)} hosts; this is no "
            "other run: correct one of both"
        )
    return OnHosts(hosts, args.master_addr or master_address(hosts), args.ssh_port)


def request_of(args: argparse.Namespace, name: str, array: str | None = None) -> slurm.Request:
    """What Slurm is asked for.

    Args:
        name: of the job, where the command line gives none.

    Raises:
        UsageError: nothing says how many ranks a node gets.
    """
    if args.gpus_per_node is None and args.tasks_per_node is None:
        raise UsageError("--slurm needs --gpus-per-node N, or --tasks-per-node N for ranks on CPUs")
    return slurm.Request(
        args.nodes or 1,
        args.gpus_per_node or args.tasks_per_node,
        args.gpus_per_node is not None,
        args.cpus_per_rank,
        args.job_name or name,
        args.time,
        args.partition,
        args.account,
        args.qos,
        array,
    )
