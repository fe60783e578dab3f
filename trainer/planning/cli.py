"""`mixmae plan RECIPE --gpus 64 --gpu a100-80g`: memory, time and cost of a run before it is started.

Needs no GPU: activations are measured on the meta device, the rest is arithmetic.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from mixmae.trainer.planning.devices import GPUS, build_cluster, find_gpu
from mixmae.trainer.planning.plan import Assumptions, make_plan
from mixmae.trainer.planning.tables import report, values
from mixmae.trainer.recipe.arguments import above_0, add_recipe, at_least, share, size
from mixmae.trainer.recipe.loading import load_recipe

_WIDTH = 100


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    recipe = load_recipe(args.recipe, args.overrides)
    gpu = find_gpu(args.gpu, args.gpu_memory, args.gpu_tflops, args.gpu_bandwidth)
    cluster = build_cluster(gpu, args.gpus, args.gpus_per_node, args.link)
    given = Assumptions(args.mfu, args.images, args.image_bytes, args.write_rate, args.price_per_gpu_hour)
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
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)}; any other by its figures")
    parser.add_argument("--gpu-memory", type=above_0, metavar="GIB", help="of a GPU, as torch reports it")
    parser.add_argument("--gpu-tflops", type=above_0, metavar="N", help="dense peak in the recipe's precision")
    parser.add_argument("--gpu-bandwidth", type=above_0, metavar="GB/S", help="to the other GPUs of its node (default "
                        "of an unknown one: PCIe 4)")  # fmt: skip
    parser.add_argument("--price-per-gpu-hour", type=above_0, metavar="PRICE", help="in any currency: adds the cost")
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
