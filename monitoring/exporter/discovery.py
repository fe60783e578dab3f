"""Where Prometheus finds a run's nodes: one file_sd target file per node in the run directory."""

import json
from pathlib import Path


def targets_folder(run_dir: Path) -> Path:
    return run_dir / "monitoring" / "targets"


def write_target(run_dir: Path, node: str, address: str) -> Path:
    """Announces a node's exporter, `host:port`."""
    folder = targets_folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file, partial = folder / f"{node}.json", folder / f".{node}"
    content = [{"targets": [address], "labels": {"run": run_dir.resolve().name, "node": node}}]
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(file)
    return file


def forget_targets(run_dir: Path) -> None:
    """Removes what an earlier start of the run left."""
    for file in targets_folder(run_dir).glob("*.json"):
        file.unlink(missing_ok=True)
