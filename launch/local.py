"""`mixmae launch RECIPE --local N`: N ranks on this machine, under DeepSpeed's launcher."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UsageError
from trainer.ports import free_port
from trainer.recipes import load_recipe


def local_command(recipe: Path, ranks: int, overrides: Sequence[str]) -> list[str]:
    """What starts `ranks` ranks on this machine alone, whatever hostfile and ports it has."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    here = ["--hostfile", os.devnull, "--num_gpus", str(ranks), "--master_port", str(free_port())]
    return [*launcher, *here, "--module", "trainer.pretrain", str(recipe), *overrides]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae launch", description=__doc__)
    parser.add_argument("recipe", type=Path, help="YAML file, such as configs/pretrain/swin_base_w14.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, such as train.micro_batch=64"
    )
    parser.add_argument(
        "--local", type=int, required=True, metavar="N", help="ranks on this machine, one per accelerator"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    args = parser.parse_intermixed_args(argv)
    if args.local < 1:
        raise UsageError(f"--local {args.local}: expected 1 or more ranks")
    recipe = load_recipe(args.recipe, args.overrides)
    recipe.accumulation(args.local)
    command = local_command(args.recipe, args.local, args.overrides)
    if args.dry_run:
        print(shlex.join(command))
        return 0
    recipe.streams_of(0, args.local)
    if recipe.data.directory is not None and not recipe.data.directory.is_dir():
        raise UsageError(f"shard directory {recipe.data.shards} does not exist; make one with 'mixmae shards build'")
    threads = str(max(1, (os.cpu_count() or 1) // args.local))
    return subprocess.call(command, env={"OMP_NUM_THREADS": threads, **os.environ})
