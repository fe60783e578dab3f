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
from mixmae.trainer.recipe.frozen import FrozenRecipes, freeze, frozen_file
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe

TRAINER = "mixmae.trainer.train"
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
        return _submit(args, argv)
    recipe = load_recipe(args.recipe, args.overrides)
    way = on_hosts(args) if args.hostfile is not None else local(args.local)
    frozen = freeze([recipe], argv)
    job = _job(frozen, recipe.run_dir)
    _require_ranks(recipe, way.ranks)
    if args.dry_run:
        print(in_words(way.command(job, new_attempt(job), os.environ)))
        _show(frozen)
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
    frozen.write()
    print(f"mixmae: the resolved recipe is {frozen_file(recipe.run_dir, frozen.launch)}", file=sys.stderr, flush=True)
    return run(job, way, args.max_restarts or 0)


def _job(frozen: FrozenRecipes, run_dir: Path) -> Job:
    return Job(TRAINER, (str(frozen_file(run_dir, frozen.launch)),), run_dir, frozen.recipes[0].launch)


def _show(frozen: FrozenRecipes) -> None:
    """Prints the recipe that ranks would read; of an array's the first task's."""
    recipe = frozen.recipes[0]
    print(f"# {frozen_file(recipe.run_dir, frozen.launch)}\n{frozen.text(recipe)}", end="", file=sys.stderr)


def _require_ranks(recipe: Recipe, ranks: int) -> None:
    recipe.accumulation(ranks)
    recipe.streams_of(0, ranks)


def _submit(args: argparse.Namespace, argv: Sequence[str]) -> int:
    if args.array is not None:
        recipes, run_dir = slurm_array.load_array(args.recipe, args.overrides, args.array)
    else:
        recipes = [load_recipe(args.recipe, args.overrides)]
        run_dir = recipes[0].run_dir
        if slurm_array.PLACE in str(run_dir):
            raise UsageError(
                f"run_dir={run_dir}: {slurm_array.PLACE} stands for the task of an --array, which is not given"
            )
    frozen = freeze(recipes, argv)
    job = _job(frozen, run_dir)
    request = request_of(args, _plain(run_dir.name), args.array)
    for recipe in recipes:
        _require_ranks(recipe, request.ranks)
    site = read_site(find_site(args.site, os.environ))
    restarts = _SLURM_RESTARTS if args.max_restarts is None else args.max_restarts
    script = slurm.slurm_script(job, request, site, restarts, preflight=not args.skip_preflight)
    if args.dry_run:
        print(script, end="")
        _show(frozen)
        return 0
    frozen.write()
    number = slurm.submit(script, job, args.array)
    output = slurm.output_file(job, request).replace("%j", number)
    read = job.arguments[0].replace(slurm_array.PLACE, "%a")
    print(f"mixmae: job {number} is submitted; it reads {read} and writes {output}", file=sys.stderr)
    print(number)
    return 0


def _plain(name: str) -> str:
    """A job's name out of that of its run directory."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name.replace(slurm_array.PLACE, "")).strip("-") or "mixmae"
