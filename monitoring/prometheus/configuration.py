"""Prometheus' configuration for runs of this machine: the shipped one, with their exporters and the reader's password.

Run directories may be somebody else's. Their target files are read here, not by Prometheus: what it gets are addresses,
names of nodes and of directories, and nothing that a run directory could say beside.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from mixmae.monitoring.exporter.access import Access
from mixmae.monitoring.exporter.discovery import Target, read_targets, run_label

HERE = Path(__file__).parents[1]
HOST = "127.0.0.1"
INTERVAL = "5s"
"""Between two scrapes: three times as often as shipped, since runs on one machine have few series and may be short."""
PASSWORD = "password"
"""File below the data folder."""

Runs = Mapping[Path, list[Target]]
"""The exporters that run directories announce now."""


def run_dirs(folders: Iterable[Path]) -> list[Path]:
    """The folders themselves, which may be runs that have not begun, and the runs right below them."""
    found = []
    for folder in folders:
        below = {targets.parents[1] for targets in folder.glob("*/monitoring/targets")}
        found += [folder.resolve(), *sorted(path.resolve() for path in below)]
    return list(dict.fromkeys(found))


def find_runs(folders: Iterable[Path], access: Access) -> tuple[Runs, list[str]]:
    """The runs that announce exporters, and why some are not watched: one bad run keeps no other from it."""
    found: dict[Path, list[Target]] = {}
    notes: list[str] = []
    for folder in run_dirs(folders):
        targets, problems = read_targets(folder)
        notes += [f"{problem} (the other runs are watched)" for problem in problems]
        if any(target.scheme == "https" for target in targets) and access.certfile is None:
            notes.append(f"{folder} is not watched: its exporters speak TLS; give their certificate with --certfile")
            targets = [target for target in targets if target.scheme == "http"]
        if targets:
            found[folder] = targets
    return found, notes


def targets_file(data: Path, scheme: str) -> Path:
    """Where Prometheus finds the exporters of one scheme."""
    return data / f"targets-{scheme}.json"


def target_groups(runs: Runs, scheme: str) -> str:
    """The content of such a file."""
    groups = [
        {"targets": [target.address], "labels": {"run": run_label(folder), "node": target.node}}
        for folder, targets in runs.items()
        for target in targets
        if target.scheme == scheme
    ]
    return json.dumps(groups, indent=1) + "\n"


def configuration(data: Path, access: Access, alertmanager_port: int | None, interval: str = INTERVAL) -> str:
    """The shipped prometheus.yml for the runs that `targets_file` lists, as YAML.

    Args:
        data: where that file and the one with the password are.
        access: the reader's certificate and password for exporters that speak TLS.
        alertmanager_port: of the Alertmanager on this machine; None for none.
        interval: between scrapes and between evaluations of the rules, such as `5s`.
    """
    content = yaml.safe_load((HERE / "prometheus.yml").read_text())
    content["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    content["rule_files"] = [str(HERE / name) for name in content["rule_files"]]
    if alertmanager_port is None:
        del content["alerting"]
    else:
        content["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"{HOST}:{alertmanager_port}"]
    content["scrape_configs"] = [*_jobs(content["scrape_configs"][0], data, access)]
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text


def _jobs(shipped: dict[str, Any], data: Path, access: Access) -> Iterator[dict[str, Any]]:
    """A scrape job for each scheme; the label `job` of both is the shipped one. No redirection is followed."""
    for scheme in ("http", *(("https",) if access.certfile is not None else ())):
        job = deepcopy(shipped)
        job["file_sd_configs"][0]["files"] = [str(targets_file(data, scheme))]
        if scheme == "https":
            job["relabel_configs"] = [{"target_label": "job", "replacement": job["job_name"]}]
            job["job_name"] += "-https"
            job |= {"scheme": "https", "tls_config": {"ca_file": str(Path(str(access.certfile)).absolute())}}
            if access.credentials is not None:
                job["basic_auth"] = {"username": access.credentials[0], "password_file": str(data / PASSWORD)}
        yield job
