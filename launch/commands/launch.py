"""`mixmae launch RECIPE`: starts a run on this machine, on the hosts of a hostfile, or as a Slurm job."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.base.exit_codes import FINISHED
from mixmae.base.ownership import hold_run
from mixmae.launch.backends import slurm_array
from mixmae.launch.backends.hostfile import HostfileBackend, require_pdsh
from mixmae.launch.backends.job_spec import JobSpec, new_attempt
from mixmae.launch.backends.local import LocalBackend
from mixmae.launch.backends.options import (
    add_backend_options,
    hostfile_backend,
    local_backend,
    require_matching_options,
    slurm_request,
)
from mixmae.launch.backends.site import find_site, read_site
from mixmae.launch.backends.slurm_script import output_file, slurm_script, submit
from mixmae.launch.preflight.local_checks import check_this_machine
from mixmae.launch.preflight.preflight import preflight
from mixmae.launch.supervision.restart_loop import run_with_restarts
from mixmae.trainer.recipe.arguments import add_recipe
from mixmae.trainer.recipe.frozen import FrozenRecipes, freeze, frozen_file
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe

TRAINER = "mixmae.trainer.train"
_SLURM_RESTARTS = 3


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UsageError: an option belongs to another backend than was chosen.
    """
    parser = argparse.ArgumentParser(prog="mixmae launch", description=__doc__, allow_abbrev=False)
    add_recipe(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and the resolved recipe")
    parser.add_argument("--max-restarts", type=int, metavar="N", help="restart after a failure, until N restarts in a "
                        f"row saved no new checkpoint (default 0; --slurm {_SLURM_RESTARTS})")  # fmt: skip
    parser.add_argument("--array", metavar="TASKS", help="with --slurm: such as 0-7%%2; {task} in values is the task's "
                        "number")  # fmt: skip
    parser.add_argument("--change", action="store_true", help="go on from the checkpoint although the recipe changes "
                        "what is computed, such as train.duration or optim.base_lr; events.jsonl tells")  # fmt: skip
    parser.add_argument("--take-over", action="store_true", help="start although another process has the run, which "
                        "ends at its next checkpoint")  # fmt: skip
    parser.add_argument(
        "--skip-preflight", action="store_true", help="start without preflight checks of the hosts or of this machine"
    )
    add_backend_options(parser)
    args = parser.parse_intermixed_args(argv)
    require_matching_options(args)
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.max_restarts is not None and args.max_restarts < 0:
        raise UsageError(f"--max-restarts {args.max_restarts}: expected 0 or more")
    if args.slurm:
        return _submit(args, argv)
    recipe = load_recipe(args.recipe, args.overrides)
    if args.hostfile is not None:
        backend: HostfileBackend | LocalBackend = hostfile_backend(args, resolve=not args.dry_run)
    else:
        backend = local_backend(args.local)
    frozen = freeze([recipe], argv)
    job = _job(frozen, recipe.run_dir, args.change)
    _require_ranks(recipe, backend.ranks)
    if args.dry_run:
        print(backend.command(job, new_attempt(job), os.environ).describe())
        _show(frozen)
        return 0
    if isinstance(backend, HostfileBackend):
        require_pdsh()
    elif not args.skip_preflight:
        check_this_machine(recipe, backend.ranks)
    with hold_run(recipe.run_dir, args.take_over) as holding:
        if isinstance(backend, HostfileBackend) and not args.skip_preflight:
            _preflight(backend, recipe)
        frozen.write()
        written = frozen_file(recipe.run_dir, frozen.launch)
        print(f"mixmae: the resolved recipe is {written}", file=sys.stderr, flush=True)
        return run_with_restarts(job, backend, args.max_restarts or 0, holding)


def _preflight(backend: HostfileBackend, recipe: Recipe) -> None:
    if (code := preflight(backend, recipe)) != FINISHED:
        raise UsageError(
            f"preflight checks found errors on the hosts, shown above (exit code {code}); fix them, or use "
            "--skip-preflight"
        )


def _job(frozen: FrozenRecipes, run_dir: Path, change: bool) -> JobSpec:
    arguments = (str(frozen_file(run_dir, frozen.launch)), *(["--change"] if change else []))
    return JobSpec(TRAINER, arguments, run_dir, frozen.recipes[0].launch)


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
        if slurm_array.TASK in str(run_dir):
            raise UsageError(
                f"run_dir={run_dir}: {slurm_array.TASK} stands for the task of an --array, which is not given"
            )
    frozen = freeze(recipes, argv)
    job = _job(frozen, run_dir, args.change)
    request = slurm_request(args, _plain(run_dir.name), args.array, recipes[0].data.num_workers)
    for recipe in recipes:
        _require_ranks(recipe, request.ranks)
    site = read_site(find_site(args.site, os.environ))
    restarts = _SLURM_RESTARTS if args.max_restarts is None else args.max_restarts
    script = slurm_script(job, request, site, restarts, not args.skip_preflight, args.take_over)
    if args.dry_run:
        print(script, end="")
        _show(frozen)
        return 0
    frozen.write()
    number = submit(script, job, args.array)
    output = output_file(job, request).replace("%j", number)
    read = job.arguments[0].replace(slurm_array.TASK, "%a")
    print(f"mixmae: job {number} is submitted; it reads {read} and writes {output}", file=sys.stderr)
    print(number)
    return 0


def _plain(name: str) -> str:
    """A job name, from that of the run directory."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name.replace(slurm_array.TASK, "")).strip("-") or "mixmae"
