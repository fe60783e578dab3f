"""`mixmae plan RECIPE --gpus 64 --gpu a100-80g`: memory, time and cost of a run before it is started.

Needs no GPU: activations are measured on the meta device, the rest is arithmetic.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from mixmae.trainer.benchmarks.results import RESULTS
from mixmae.trainer.planning.devices import GPUS, build_cluster
from mixmae.trainer.planning.plan import Assumptions, make_plan
from mixmae.trainer.planning.tables import report, values
from mixmae.trainer.recipe.arguments import add_recipe, at_least, share, size
from mixmae.trainer.recipe.loading import load_recipe

_WIDTH = 100


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    recipe = load_recipe(args.recipe, args.overrides)
    cluster = build_cluster(args.gpu, args.gpus, args.gpus_per_node, args.link)
    given = Assumptions(args.mfu, args.images, args.image_bytes, args.write_rate, RESULTS)
    plan = make_plan(recipe, cluster, given)
    if args.json:
        json.dump(values(plan), sys.stdout, indent=1)
        print()
        return 0
    console = Console(highlight=False)
    console.width = min(console.width, _WIDTH)
    console.print(report(plan), crop=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixmae plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe(parser)
    parser.add_argument("--gpus", type=at_least(1), required=True, help="number of GPUs of all nodes")
    parser.add_argument("--gpu", required=True, help=", ".join(GPUS))
    parser.add_argument("--gpus-per-node", type=at_least(1), default=8, help="default %(default)s")
    parser.add_argument(
        "--link", help="bandwidth of a node's network, such as 200gbps or 8x400gbps; assumed to be reached"
    )
    parser.add_argument("--mfu", type=share, help="model FLOPs utilization while computing (default: as measured)")
    parser.add_argument(
        "--images", type=at_least(1), help="images per epoch (default: the recipe's shards, or ImageNet-1K)"
    )
    parser.add_argument(
        "--image-bytes", type=size, help="mean size of an image, such as 110KB (default as for --images)"
    )
    parser.add_argument(
        "--write-rate", type=size, default=10**9, help="bytes per second that a node writes (default 1GB)"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, in bytes and seconds")
    return parser
