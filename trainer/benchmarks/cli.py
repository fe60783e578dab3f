"""`mixmae bench NAME`: benchmarks of parts of a run, with a reference measured in the same process."""

import argparse
import importlib
from collections.abc import Sequence

BENCHMARKS = {
    "step": "images per second, FLOP/s and memory of variants of the training step",
    "window": "time of attention inside windows, in this project's kernel and in torch's",
    "mixed-conv": "time and memory of mixed convolutions beside plain ones",
    "loop": "overhead of the training loop over the bare step",
    "data": "images per second of a recipe's input pipeline",
    "scale": "images per second of several ranks on this machine, and traffic of each ZeRO stage",
    "communication": "rounding errors of gradients that are summed over ranks, in bf16 and fp32",
    "monitoring": "overhead of metrics per step",
    "checkpoints": "stall of a save, and duration of saving and resuming",
    "claim": "what pretraining is worth to fine-tuning with few labels, by method, at equal time",
    "scrape": "time to scrape all exporters of a large run",
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench", description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS, help="; ".join(f"{n}: {t}" for n, t in BENCHMARKS.items()))
    args = parser.parse_args(argv[:1])
    module = args.benchmark.replace("-", "_")
    return int(importlib.import_module(f"mixmae.trainer.benchmarks.{module}").main(argv[1:]))
