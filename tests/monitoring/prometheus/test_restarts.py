"""A run that is killed and started again: what the real Prometheus makes of its counters, and who is told."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mixmae.base.run_directory import EVENTS
from mixmae.monitoring.metrics import METRICS, Kind
from mixmae.trainer.telemetry.events import past_ends, read_events
from tests.helpers import tiny_recipe
from tests.monitoring.watching import Watching, watching

pytestmark = [pytest.mark.slow, pytest.mark.services, pytest.mark.timeout(3600)]
SERIES = [metric.full_name for metric in METRICS if metric.kind is Kind.COUNTER] + [
    f"{metric.full_name}_{part}" for metric in METRICS if metric.kind is Kind.HISTOGRAM for part in ("count", "sum")
]
"""All that must only grow within a process."""


@contextmanager
def attempt(recipe: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The main job as a user starts it, killed at the end of the context."""
    command = [sys.executable, "-m", "mixmae.trainer.train", str(recipe)]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def is_scraped(watched: Watching, restarts: int) -> bool:
    """Whether the attempt after so many restarts has made some steps, and Prometheus knows."""
    found = watched.query('sum(mixmae_resumes_total{reason="killed"}) and on () max(mixmae_step) > 5')
    return [float(one["value"][1]) for one in found] == [restarts]


@pytest.fixture(scope="module")
def killed_thrice(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Watching]]:
    """A run in its fourth attempt, and who watched all of them."""
    folder = tmp_path_factory.mktemp("restarts")
    endless = {"train.duration": "1000000 steps", "checkpoint.every": "20 steps", "checkpoint.keep": 1}
    own = {"data.shards": str(shards), "run_dir": str(folder / "run"), "monitoring.port": 0}
    (folder / "recipe.yaml").write_text(tiny_recipe(**{**endless, **own}).to_yaml())
    with watching([folder / "run"], folder / "data", alive=lambda: True) as watched:
        for number in range(3):
            with attempt(folder / "recipe.yaml"):
                watched.until(partial(is_scraped, watched, number))
        with attempt(folder / "recipe.yaml"):
            yield folder / "run", watched


def test_restarts_in_a_row_are_told_until_they_end(killed_thrice: tuple[Path, Watching]) -> None:
    run_dir, watched = killed_thrice
    watched.fire("MixmaeRestartsInARow")
    assert "killed or failed, and started again, 3 times within an hour" in watched.summary("MixmaeRestartsInARow")
    assert past_ends(run_dir) == ["killed"] * 4  # the present one has not told otherwise
    resumed = read_events(run_dir, "resumed")
    assert [event["reason"] for event in resumed] == ["killed"] * len(resumed)
    watched.resolve("MixmaeRestartsInARow")


def test_rates_have_no_spikes_where_a_run_was_started_again(killed_thrice: tuple[Path, Watching]) -> None:
    run_dir, watched = killed_thrice
    began = read_first(run_dir)["time"]
    seconds = int(time.time() - began)
    counted = 0
    for name in SERIES:
        lowest = watched.query(f"min(min_over_time(rate({name}[5s])[{seconds}s:1s]))")
        counted += len(lowest)
        assert all(float(one["value"][1]) >= 0 for one in lowest), name
    assert counted > len(SERIES) / 2
    fastest = watched.value(f"max(max_over_time(rate(mixmae_images_total[5s])[{seconds}s:1s]))")
    told = watched.value(f"max(max_over_time(mixmae_images_per_second[{seconds}s]))")
    assert 0 < fastest < 2 * told
    grown = watched.value(f"sum(increase(mixmae_optimizer_steps_total[{seconds}s]))")
    steps = (run_dir / EVENTS).read_text().count('"event": "step"')
    assert 0 < grown < 1.05 * steps


def read_first(run_dir: Path) -> dict[str, Any]:
    return read_events(run_dir, "start")[0]
