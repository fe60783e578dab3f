"""Prometheus' configuration for runs of this machine: the shipped one, with their folders and their passwords."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from mixmae.base.run_directory import RECIPE, targets_folder
from mixmae.monitoring.exporter.access import Access, access_of, read_recipe

HERE = Path(__file__).parents[1]
HOST = "127.0.0.1"
INTERVAL = "5s"
"""Between two scrapes: three times as often as shipped, since runs on one machine have few series and may be short."""


def run_dirs(folders: Iterable[Path]) -> list[Path]:
    """The folders themselves, which may be runs that have not begun, and the runs right below them."""
    found = []
    for folder in folders:
        below = {targets.parents[1] for targets in folder.glob("*/monitoring/targets")}
        found += [folder.resolve(), *sorted(path.resolve() for path in below)]
    return list(dict.fromkeys(found))


def target_files(folders: Iterable[Path]) -> list[Path]:
    """The target files that are there now."""
    return [file for folder in run_dirs(folders) for file in sorted(targets_folder(folder).glob("*.json"))]


def configuration(folders: Iterable[Path], data: Path, alertmanager_port: int | None, interval: str = INTERVAL) -> str:
    """The shipped prometheus.yml for these folders, as YAML.

    Args:
        data: where `password_files` are.
        alertmanager_port: of the Alertmanager on this machine; None for none.
        interval: between scrapes and between evaluations of the rules, such as `5s`.

    Raises:
        OSError: a file with a password cannot be read.
    """
    content = yaml.safe_load((HERE / "prometheus.yml").read_text())
    content["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    content["rule_files"] = [str(HERE / name) for name in content["rule_files"]]
    if alertmanager_port is None:
        del content["alerting"]
    else:
        content["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"{HOST}:{alertmanager_port}"]
    content["scrape_configs"] = [*_jobs(content["scrape_configs"][0], folders, data)]
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text


def password_files(folders: Iterable[Path], data: Path) -> dict[Path, str]:
    """Files for Prometheus with the passwords alone, and what belongs into them.

    Raises:
        OSError: a recipe's own file cannot be read.
    """
    accesses = enumerate(_by_access(folders))
    return {_password_file(data, n): one.credentials[1] for n, one in accesses if one.credentials is not None}


def _jobs(shipped: dict[str, Any], folders: Iterable[Path], data: Path) -> Iterator[dict[str, Any]]:
    """A scrape job for each kind of access; the label `job` of all is the shipped one."""
    for number, (access, files) in enumerate(_by_access(folders).items()):
        job = deepcopy(shipped)
        job["file_sd_configs"][0]["files"] = files
        if number:
            job["relabel_configs"] = [{"target_label": "job", "replacement": job["job_name"]}]
            job["job_name"] += f"-{number}"
        if access.certfile is not None:
            job |= {"scheme": "https", "tls_config": {"ca_file": str(access.certfile.absolute())}}
        if access.credentials is not None:
            job["basic_auth"] = {"username": access.credentials[0], "password_file": str(_password_file(data, number))}
        yield job


def _by_access(folders: Iterable[Path]) -> dict[Access, list[str]]:
    """Patterns of target files by their runs' access; plain HTTP without authentication first."""
    found: dict[Access, list[str]] = {Access(): []}
    for folder in run_dirs(folders):
        access = access_of(read_recipe(folder / RECIPE))
        found.setdefault(access, []).append(str(targets_folder(folder) / "*.json"))
    return {access: files for access, files in found.items() if files}


def _password_file(data: Path, number: int) -> Path:
    return data / f"password-{number}"
