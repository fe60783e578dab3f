"""`python -m mixmae.trainer.train RECIPE key=value ...`, alone or under deepspeed, torchrun or srun.

Importing torch takes seconds, in which a rank may already be asked to stop, and whoever started it looks for a sign of
life: what notes the one and gives the other comes first.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from mixmae.base.errors import UsageError, run_rank
from mixmae.base.heartbeat import begin_heartbeat
from mixmae.base.logs import set_up_logging
from mixmae.base.ownership import HELD, hold_run
from mixmae.base.signals import StopRequest
from mixmae.trainer.recipe.arguments import add_recipe
from mixmae.trainer.recipe.loading import load_recipe


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae.trainer.train", description=__doc__)
    add_recipe(parser)
    parser.add_argument("--world-size", type=int, metavar="N", help="refuse to run with another number of ranks")
    parser.add_argument("--change", action="store_true", help="go on although the recipe changes what is computed")
    parser.add_argument("--take-over", action="store_true", help="start although another process has the run")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # deepspeed's launcher passes it; the environment has it too
    args = parser.parse_args(argv)
    stop = StopRequest()
    set_up_logging()
    heartbeat = begin_heartbeat(os.environ)
    recipe = load_recipe(args.recipe, args.overrides)

    from mixmae.trainer.engine.distributed import read_ranks
    from mixmae.trainer.run.lifecycle import train

    ranks = read_ranks(os.environ)
    if args.world_size not in (None, ranks.world_size):
        raise UsageError(
            f"expected world size {args.world_size}, got {ranks.world_size}; refusing to start: check the hostfile or "
            "the job's size"
        )
    if not ranks.is_main or HELD in os.environ:
        return train(recipe, ranks, stop, heartbeat, args.change)
    with hold_run(recipe.run_dir, args.take_over):
        return train(recipe, ranks, stop, heartbeat, args.change)


if __name__ == "__main__":
    code = run_rank(main, sys.argv[1:])
    if "torch" in sys.modules:
        from mixmae.trainer.engine.distributed import leave

        leave(code)
    sys.exit(code)
