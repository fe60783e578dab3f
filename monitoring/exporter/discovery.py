"""Service discovery: one file_sd target file per node in the run directory."""

import json
from pathlib import Path

from mixmae.base.files import atomic_write
from mixmae.base.run_directory import targets_folder


def write_target(run_dir: Path, node: str, address: str) -> Path:
    """Announces a node's exporter, `host:port`."""
    file = targets_folder(run_dir) / f"{node}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = [{"targets": [address], "labels": {"run": run_dir.resolve().name, "node": node}}]
    atomic_write(file, json.dumps(content) + "\n")
    return file


def remove_targets(run_dir: Path) -> None:
    """Removes what an earlier start of the run left."""
    for file in targets_folder(run_dir).glob("*.json"):
        file.unlink(missing_ok=True)
