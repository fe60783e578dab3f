"""Service discovery: one file_sd target file per node in the run directory.

A run directory may be somebody else's. What its target files say decides where a scrape goes, and nothing else: they
name no file of the reader's, and a password goes to an address of theirs only if that proves to have the certificate
which the reader gave.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmae.base.files import atomic_write, read_regular
from mixmae.base.json_text import parse_json
from mixmae.base.run_directory import targets_folder

_SCHEME = "__scheme__"
"""The label by which Prometheus takes a target's scheme."""
_ADDRESS = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_LONGEST_NAME = 255


@dataclass(frozen=True, order=True)
class Target:
    """A node's exporter, as its run directory announces it.

    Attributes:
        address: `host:port`.
        scheme: http or https.
        run: what the run calls itself.
    """

    address: str
    node: str
    scheme: str = "http"
    run: str = ""

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}/metrics"


def run_label(run_dir: Path) -> str:
    """What a run is called in metrics: its directory's path, since last names are alike."""
    return str(run_dir.resolve())


def write_target(run_dir: Path, node: str, address: str, scheme: str = "http", run: str | None = None) -> Path:
    """Announces a node's exporter, `host:port`.

    Args:
        run: what all nodes of the run call it; None: as `run_label` does.
    """
    file = targets_folder(run_dir) / f"{node}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    labels = {"run": run or run_label(run_dir), "node": node} | ({_SCHEME: scheme} if scheme != "http" else {})
    atomic_write(file, json.dumps([{"targets": [address], "labels": labels}]) + "\n")
    return file


def remove_targets(run_dir: Path) -> None:
    """Removes what an earlier start of the run left."""
    for file in targets_folder(run_dir).glob("*.json"):
        file.unlink(missing_ok=True)


def read_targets(run_dir: Path) -> tuple[list[Target], list[str]]:
    """The announced exporters, and what is wrong with files that announce none."""
    found, problems = list[Target](), list[str]()
    try:
        files = sorted(targets_folder(run_dir).glob("*.json"))
    except OSError as error:
        return [], [f"{targets_folder(run_dir)} cannot be read: {error.strerror}"]
    for file in files:
        try:
            found += _targets_in(parse_json(read_regular(file)))
        except FileNotFoundError:
            continue  # its node has just ended
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = f"{type(error).__name__}: {str(error)[:80]}"
            problems.append(f"{file} is no Prometheus target file; remove it: {why}")
    return found, problems


def _targets_in(groups: Any) -> Iterator[Target]:
    for group in groups:
        labels = group["labels"]
        node, run, scheme = str(labels["node"]), str(labels.get("run", "")), labels.get(_SCHEME, "http")
        if scheme not in ("http", "https") or len(node) > _LONGEST_NAME:
            raise ValueError(f"label {_SCHEME}={scheme!r}, node={node[:40]!r}")
        for address in group["targets"]:
            if not _ADDRESS.fullmatch(address):
                raise ValueError(f"{address!r} is no host:port")
            yield Target(address, node, scheme, run)
