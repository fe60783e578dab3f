"""`mixmae launch RECIPE`: ranks on this machine, on the hosts of a hostfile, or as a job of Slurm."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.base.exit_codes import FINISHED
from mixmae.launch.backends import slurm, slurm_array
from mixmae.launch.backends.choice import add_ways, local, on_hosts, request_of, require_fitting
from mixmae.launch.backends.hostfile import OnHosts, require_pdsh
from mixmae.launch.backends.job import Job, new_attempt
from mixmae.launch.backends.site import find_site, read_site
from mixmae.launch.preflight.preflight import preflight
from mixmae.launch.supervision.run import in_words, run
from mixmae.trainer.recipe.arguments import add_recipe
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe

_SLURM_RESTARTS = 3


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UsageError: an option belongs to another way of starting than was chosen.
    """
    parser = argparse.ArgumentParser(prog="mixmae launch", description=__doc__, allow_abbrev=False)
    add_recipe(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be run or submitted, nothing else")
    parser.add_argument("--max-restarts", type=int, metavar="N", help="start again after a failure, until N restarts "
                        f"in a row saved no further checkpoint (default 0; --slurm {_SLURM_RESTARTS})")  # fmt: skip
    parser.add_argument("--array", metavar="TASKS", help="with --slurm: such as 0-7%%2; {task} in values is the task's "
                        "number")  # fmt: skip
    parser.add_argument("--skip-preflight", action="store_true", help="start without looking at all hosts first, as "
                        "mixmae doctor does; --local never does")  # fmt: skip
    add_ways(parser)
    args = parser.parse_intermixed_args(argv)
    require_fitting(args)
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.max_restarts is not None and args.max_restarts < 0:
        raise UsageError(f"--max-restarts {args.max_restarts}: expected 0 or more")
    if args.slurm:
        return _submit(args)
    recipe = load_recipe(args.recipe, args.overrides)
    way = on_hosts(args) if args.hostfile is not None else local(args.local)
    job = _job(args, recipe, str(recipe.run_dir))
    _require_ranks(recipe, way.ranks)
    if args.dry_run:
        print(in_words(way.command(job, new_attempt(job), os.environ)))
        return 0
    if isinstance(way, OnHosts):
        require_pdsh()
        words = (str(args.recipe), *args.overrides)
        if not args.skip_preflight and (code := preflight(way, recipe, words)) != FINISHED:
            raise UsageError(
                f"the look at the hosts before the start found errors, shown above (exit code {code}); mend them, or "
                "start with --skip-preflight"
            )
    elif recipe.data.directory is not None and not recipe.data.directory.is_dir():
        raise UsageError(f"shard directory {recipe.data.shards} does not exist; make one with 'mixmae shards build'")
    return run(job, way, args.max_restarts or 0)


def _job(args: argparse.Namespace, recipe: Recipe, run_dir: str) -> Job:
    return Job("mixmae.trainer.train", (str(args.recipe), *args.overrides), Path(run_dir), recipe.launch)


def _require_ranks(recipe: Recipe, ranks: int) -> None:
    recipe.accumulation(ranks)
    recipe.streams_of(0, ranks)


def _submit(args: argparse.Namespace) -> int:
    if args.array is not None:
        recipe, run_dir = slurm_array.load_array(args.recipe, args.overrides, args.array)
    else:
        recipe = load_recipe(args.recipe, args.overrides)
        run_dir = str(recipe.run_dir)
    job = _job(args, recipe, run_dir)
    request = request_of(args, _plain(Path(run_dir).name), args.array)
    _require_ranks(recipe, request.ranks)
    site = read_site(find_site(args.site, os.environ))
    restarts = _SLURM_RESTARTS if args.max_restarts is None else args.max_restarts
    script = slurm.slurm_script(job, request, site, restarts, preflight=not args.skip_preflight)
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
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name.replace(slurm_array.PLACE, "")).strip("-") or "mixmae"
