"""`mixmae bench data RECIPE`: how fast parts of a run are here, beside a reference measured in the same run."""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.run_dir import versions

BENCHMARKS = {"data": ("trainer.data.bench", "images per second of a recipe's input pipeline")}
RESULTS = Path("benchmarks/results")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench", description=__doc__)
    listing = "; ".join(f"{name}: {text}" for name, (_, text) in BENCHMARKS.items())
    parser.add_argument("benchmark", choices=BENCHMARKS, help=listing)
    args = parser.parse_args(argv[:1])
    return int(importlib.import_module(BENCHMARKS[args.benchmark][0]).main(argv[1:]))


def circumstances() -> dict[str, Any]:
    """What a figure was measured on and with."""
    return {
        "command": " ".join(["mixmae", *sys.argv[1:]]),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(),
        "commit": _commit(),
    }


def write_result(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**content, **circumstances()}, indent=1) + "\n")
    print(f"written to {file}")


def _cpu() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Of the working tree, with `-dirty` where it was changed; None outside of a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return found.stdout.strip() or None
