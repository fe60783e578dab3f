"""Metadata of a benchmark's result: machine, versions, command."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixmae.base.software import versions

RESULTS = Path("benchmarks/results")


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


def write_measurements(file: Path, measurements: list[dict[str, Any]]) -> None:
    """Measurements of several things in one run, each of which tells its own circumstances."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(measurements, indent=1) + "\n")
    print(f"written to {file}", flush=True)


def merge_measurements(file: Path, measurements: list[dict[str, Any]], keys: Sequence[str]) -> None:
    """Adds measurements of several things, each of which tells its own circumstances, to those of a file.

    Args:
        keys: by which the file's measurements are told apart; an older one with the same values goes.
    """

    def key(found: dict[str, Any]) -> list[Any]:
        return [found.get(name) for name in keys]

    new = [key(found) for found in measurements]
    kept = json.loads(file.read_text()) if file.is_file() else []
    write_measurements(file, [*(old for old in kept if key(old) not in new), *measurements])


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
