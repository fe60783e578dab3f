"""`mixmae launch RECIPE`: ranks on this machine, on the hosts of a hostfile, or as a job of Slurm."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import array, slurm
from launch.hostfile import OnHosts, master_address, require_pdsh
from launch.hosts import read_hostfile, select
from launch.job import Job, new_attempt
from launch.local import Local
from launch.run import Way, in_words, run
from launch.site import find_site, read_site
from trainer.config import Recipe
from trainer.errors import UsageError
from trainer.recipes import load_recipe

_SLURM_RESTARTS = 3
_OF_WAY = {
    "hostfile": ("include", "exclude", "ranks", "master_addr", "ssh_port"),
    "slurm": (
        *("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_rank", "job_name", "time"),
        *("partition", "account", "qos", "array", "site"),
    ),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UsageError: an option belongs to another way of starting than was chosen.
    """
    parser = argparse.ArgumentParser(prog="mixmae launch", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", type=Path, help="YAML file, such as configs/pretrain/swin_base_w14.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.micro_batch=64")
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--local", type=int, metavar="N", help="N ranks on this machine, one per accelerator")
    ways.add_argument("--hostfile", type=Path, metavar="FILE", help="lines such as 'node1 slots=8'; needs pdsh and ssh")
    ways.add_argument("--slurm", action="store_true", help="submit a batch job")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run or submitted, nothing else")
    parser.add_argument("--max-restarts", type=int, metavar="N", help="start again after a failure, until N restarts "
                        f"in a row saved no further checkpoint (default 0; --slurm {_SLURM_RESTARTS})")  # fmt: skip
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
    job.add_argument("--array", metavar="TASKS", help="such as 0-7%%2; {task} in values is the task's number")
    for name in ("partition", "account", "qos"):
        job.add_argument(f"--{name}", metavar="NAME")
    job.add_argument("--site", type=Path, metavar="FILE", help="modules, variables, container: docs/launching.md")
    args = parser.parse_intermixed_args(argv)
    chosen = "slurm" if args.slurm else "hostfile" if args.hostfile else "local"
    for way, names in _OF_WAY.items():
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
        if given and way != chosen:
            raise UsageError(f"{', '.join(given)} goes with --{way}, not with --{chosen}")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.max_restarts is not None and args.max_restarts < 0:
        raise UsageError(f"--max-restarts {args.max_restarts}: expected 0 or more")
    if args.slurm:
        return _submit(args)
    recipe = load_recipe(args.recipe, args.overrides)
    way = _hosts(args) if args.hostfile is not None else _local(args, recipe)
    job = _job(args, recipe, str(recipe.run_dir))
    _require_ranks(recipe, way.ranks)
    if args.dry_run:
        print(in_words(way.command(job, new_attempt(job), os.environ)))
        return 0
    if isinstance(way, OnHosts):
        require_pdsh()
    elif recipe.data.directory is not None and not recipe.data.directory.is_dir():
        raise UsageError(f"shard directory {recipe.data.shards} does not exist; make one with 'mixmae shards build'")
    return run(job, way, args.max_restarts or 0)


def _job(args: argparse.Namespace, recipe: Recipe, run_dir: str) -> Job:
    return Job("trainer.pretrain", (str(args.recipe), *args.overrides), Path(run_dir), recipe.launch)


def _require_ranks(recipe: Recipe, ranks: int) -> None:
    recipe.accumulation(ranks)
    recipe.streams_of(0, ranks)


def _local(args: argparse.Namespace, recipe: Recipe) -> Way:
    if args.local < 1:
        raise UsageError(f"--local {args.local}: expected 1 or more ranks")
    return Local(args.local)


def _hosts(args: argparse.Namespace) -> Way:
    hosts = select(read_hostfile(args.hostfile), args.include or "", args.exclude or "")
    if args.ranks is not None and hosts.ranks != args.ranks:
        raise UsageError(
            f"--ranks {args.ranks}, but {args.hostfile} gives {hosts.ranks} on {len(hosts.slots)} hosts; this is no "
            "other run: correct one of both"
        )
    return OnHosts(hosts, args.master_addr or master_address(hosts), args.ssh_port)


def _submit(args: argparse.Namespace) -> int:
    if args.gpus_per_node is None and args.tasks_per_node is None:
        raise UsageError("--slurm needs --gpus-per-node N, or --tasks-per-node N for ranks on CPUs")
    if args.array is not None:
        recipe, run_dir = array.load_array(args.recipe, args.overrides, args.array)
    else:
        recipe = load_recipe(args.recipe, args.overrides)
        run_dir = str(recipe.run_dir)
    job = _job(args, recipe, run_dir)
    request = slurm.Request(
        args.nodes or 1,
        args.gpus_per_node or args.tasks_per_node,
        args.gpus_per_node is not None,
        args.cpus_per_rank,
        args.job_name or _plain(Path(run_dir).name),
        args.time,
        args.partition,
        args.account,
        args.qos,
        args.array,
    )
    _require_ranks(recipe, request.ranks)
    site = read_site(find_site(args.site, os.environ))
    restarts = _SLURM_RESTARTS if args.max_restarts is None else args.max_restarts
    script = slurm.slurm_script(job, request, site, restarts)
    if args.dry_run:
        print(script, end="")
        return 0
    number = slurm.submit(script, job, args.array)
    output = slurm.output_file(job, request).replace("%j", number)
    print(f"mixmae: job {number} is submitted; it writes {output}", file=sys.stderr)
    print(number)
    return 0


def _plain(name: str) -> str:
    """A job's name out of that of its run directory."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name.replace(array.PLACE, "")).strip("-") or "mixmae"
