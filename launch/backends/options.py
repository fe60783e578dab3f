"""Command line options that choose a backend: this machine, the hosts of a hostfile, or Slurm."""

import argparse
import re
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.launch.backends.hostfile import HostfileBackend, master_address
from mixmae.launch.backends.hostfile_parser import HostSlots, read_hostfile, select
from mixmae.launch.backends.local import LocalBackend
from mixmae.launch.backends.slurm_script import SlurmRequest

_ADDRESS = re.compile(r"[A-Za-z0-9:]([A-Za-z0-9._:-]*[A-Za-z0-9:])?")
_OPTIONS = {
    "hostfile": ("include", "exclude", "ranks", "master_addr", "ssh_port"),
    "slurm": (
        *("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_rank", "job_name", "time"),
        *("partition", "account", "qos", "array", "site"),
    ),
}


def add_backend_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds `--local`, `--hostfile`, `--slurm` and the options of each."""
    backends = parser.add_mutually_exclusive_group(required=required)
    backends.add_argument("--local", type=int, metavar="N", help="N ranks on this machine, one per accelerator")
    backends.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="lines such as 'node1 slots=8'; needs pdsh and ssh"
    )
    backends.add_argument("--slurm", action="store_true", help="submit a batch job")
    hosts = parser.add_argument_group("with --hostfile")
    hosts.add_argument("--include", metavar="HOSTS", help="only these: node1@node2:0,1")
    hosts.add_argument("--exclude", metavar="HOSTS", help="all but these")
    hosts.add_argument("--ranks", type=int, metavar="N", help="refuse to start another number")
    hosts.add_argument("--master-addr", metavar="ADDRESS", help="of the first host, as all hosts reach it")
    hosts.add_argument("--ssh-port", type=int, metavar="PORT")
    job = parser.add_argument_group("with --slurm")
    job.add_argument("--nodes", type=int, metavar="N", help="default 1")
    sizes = job.add_mutually_exclusive_group()
    sizes.add_argument("--gpus-per-node", type=int, metavar="N", help="one rank each")
    sizes.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks on CPUs, without GPUs")
    job.add_argument(
        "--cpus-per-rank", type=int, metavar="N", help="default with --gpus-per-node: data.num_workers + 1"
    )
    job.add_argument("--job-name", metavar="NAME", help="default: the run directory's")
    job.add_argument("--time", metavar="LIMIT", help="such as 1-00:00:00")
    for name in ("partition", "account", "qos"):
        job.add_argument(f"--{name}", metavar="NAME")
    job.add_argument("--site", type=Path, metavar="FILE", help="modules, variables, container: docs/launching.md")


def require_matching_options(args: argparse.Namespace) -> None:
    """Raises UsageError where an option belongs to another backend than was chosen."""
    chosen = "slurm" if args.slurm else "hostfile" if args.hostfile else "local"
    for backend, names in _OPTIONS.items():
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name, None) is not None]
        if given and backend != chosen:
            raise UsageError(f"{', '.join(given)} goes with --{backend}, not with --{chosen}")


def local_backend(ranks: int) -> LocalBackend:
    """Ranks on this machine.

    Raises:
        UsageError: fewer than one.
    """
    if ranks < 1:
        raise UsageError(f"--local {ranks}: expected 1 or more ranks")
    return LocalBackend(ranks)


def hostfile_backend(args: argparse.Namespace, resolve: bool = True) -> HostfileBackend:
    """Ranks on the hosts of a hostfile.

    Args:
        resolve: False where nothing is started: the first host's name stands for an address that is not known here.

    Raises:
        UsageError: the hostfile, --include or --exclude is wrong, or gives another number of ranks than --ranks.
    """
    hosts = select(read_hostfile(args.hostfile), args.include or "", args.exclude or "")
    if args.ranks is not None and hosts.ranks != args.ranks:
        raise UsageError(
            f"expected world size {args.ranks} (--ranks), got {hosts.ranks} from {len(hosts.slots)} hosts of "
            f"{args.hostfile}; refusing to start: correct one of them"
        )
    if args.master_addr is not None and not _ADDRESS.fullmatch(args.master_addr):
        raise UsageError(f"--master-addr {args.master_addr!r}: expected a host's name or address, such as 10.0.0.1")
    return HostfileBackend(hosts, args.master_addr or _address(hosts, resolve), args.ssh_port)


def _address(hosts: HostSlots, resolve: bool) -> str:
    try:
        return master_address(hosts)
    except UsageError:
        if resolve:
            raise
        return hosts.first


def slurm_request(
    args: argparse.Namespace, name: str, array: str | None = None, num_workers: int | None = None
) -> SlurmRequest:
    """What to request from Slurm.

    Args:
        name: of the job, unless the command line gives one.
        num_workers: data workers of a rank. One with a GPU gets a core for each and one for itself, unless the command
            line says how many: Slurm's default is one for all.

    Raises:
        UsageError: the number of ranks per node is missing.
    """
    if args.gpus_per_node is None and args.tasks_per_node is None:
        raise UsageError("--slurm needs --gpus-per-node N, or --tasks-per-node N for ranks on CPUs")
    cores = args.cpus_per_rank
    if cores is None and num_workers is not None and args.gpus_per_node is not None:
        cores = num_workers + 1
    return SlurmRequest(
        args.nodes or 1,
        args.gpus_per_node or args.tasks_per_node,
        args.gpus_per_node is not None,
        cores,
        args.job_name or name,
        args.time,
        args.partition,
        args.account,
        args.qos,
        array,
    )
