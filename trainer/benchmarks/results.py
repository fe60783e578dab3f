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


def metadata() -> dict[str, Any]:
    """Machine, versions, command and commit of a measurement."""
    return {
        "command": " ".join(["mixmae", *sys.argv[1:]]),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(),
        "commit": _commit(),
    }


def write_result(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**content, **metadata()}, indent=1) + "\n")
    print(f"written to {file}")


def write_measurements(file: Path, measurements: list[dict[str, Any]]) -> None:
    """Writes measurements of one run, each with its own metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(measurements, indent=1) + "\n")
    print(f"written to {file}", flush=True)


def merge_measurements(file: Path, measurements: list[dict[str, Any]], keys: Sequence[str]) -> None:
    """Adds measurements, each with its own metadata, to those in a file.

    Args:
        keys: fields that identify a measurement; an older one with the same values is replaced.
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
    """The working tree's commit, with `-dirty` if it has changes; None outside of a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return found.stdout.strip() or None
