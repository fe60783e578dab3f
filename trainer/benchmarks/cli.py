"""`mixmae bench WHAT`: how fast parts of a run are here, beside a reference measured in the same run."""

import argparse
import importlib
from collections.abc import Sequence

BENCHMARKS = {
    "step": "images per second, MFU and memory of the training step, in several ways of computing it",
    "loop": "what the trainer's loop adds to the bare step",
    "data": "images per second of a recipe's input pipeline",
    "scale": "images per second of several ranks here, and what each ZeRO stage sends",
    "monitoring": "what metrics take from a step",
    "checkpoints": "how long training stands still for a save, and how long it takes",
    "scrape": "how long all exporters of a large run take to answer",
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench", description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS, help="; ".join(f"{n}: {t}" for n, t in BENCHMARKS.items()))
    args = parser.parse_args(argv[:1])
    return int(importlib.import_module(f"mixmae.trainer.benchmarks.{args.benchmark}").main(argv[1:]))
