"""The exporter as a process of its node's first rank."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mixmae.base.run_directory import targets_folder
from mixmae.monitoring.exporter.recorder import Recorder
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.telemetry.exporter_process import ExporterProcess
from tests.helpers import tiny_recipe


def recipe_for(tmp_path: Path, **changes: Any) -> Recipe:
    return tiny_recipe(**{"run_dir": str(tmp_path / "run"), "monitoring.port": 0, **changes})


def answer(run_dir: Path) -> str:
    """What the announced exporter says; empty while none is."""
    try:
        (file,) = targets_folder(run_dir).glob("*.json")
        (target,) = json.loads(file.read_text())[0]["targets"]
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as response:
            return str(response.read().decode())
    except (OSError, ValueError):
        return ""


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended by somebody else"])
def test_an_exporter_that_is_lost_is_started_again(end: signal.Signals, tmp_path: Path) -> None:
    """Slurm, for one, tells every process of a job to end, and its ranks then save for minutes."""
    recipe = recipe_for(tmp_path)
    recipe.run_dir.mkdir()
    recorder = Recorder(tmp_path / "shared", 0)
    exporter = ExporterProcess(recipe, tmp_path / "shared", between_starts=0)
    until(lambda: bool(answer(recipe.run_dir)))
    first = exporter.pid
    os.kill(first, end)
    until(lambda: exporter.pid != first)
    recorder.set("step", 7)
    until(lambda: 'mixmae_step{rank="0"} 7.0' in answer(recipe.run_dir))
    exporter.close(clean=True)
    assert not list(targets_folder(recipe.run_dir).glob("*.json"))
    with pytest.raises(ProcessLookupError):
        os.kill(exporter.pid, 0)


def starts_of(command: str, tmp_path: Path, between_starts: float) -> int:
    """How often a program in the exporter's place is started within a second of its first end."""
    log = tmp_path / "starts"
    with mock.patch(
        "mixmae.trainer.telemetry.exporter_process._command",
        return_value=["sh", "-c", f"echo started >> {log}; {command}"],
    ):
        exporter = ExporterProcess(recipe_for(tmp_path), tmp_path / "shared", between_starts)
    until(log.exists)
    time.sleep(1)
    exporter.close(clean=True)
    return len(log.read_text().splitlines())


@pytest.mark.parametrize(
    ("command", "between_starts", "again"),
    [("exit 1", 0, True), ("exit 1", 3600, False), ("exit 2", 0, False)],
    ids=["it fails", "it fails at once", "its settings cannot be used"],
)
def test_how_often_it_is_started(command: str, between_starts: float, again: bool, tmp_path: Path) -> None:
    assert (starts_of(command, tmp_path, between_starts) > 1) == again
