"""Each alert fires on a real fault of a real two-rank run, seen by the real Prometheus, and resolves when it is over.

All durations of the rules are divided by 60: an hour's window is a minute. What needs a GPU, or hours, is left to the
unit tests of the rules.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring import local
from monitoring.local import Monitor, find_programs, free_port_from
from tests.helpers import tiny_recipe
from tests.monitoring.services import needs
from tests.monitoring.test_local import ask
from trainer.config import Recipe
from trainer.data.stream import Batch
from trainer.distributed import Ranks, join, leave, read_ranks
from trainer.job import check, prepare
from trainer.loop import fit
from trainer.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.services]
FACTOR = 60


def quick(rules: Path, folder: Path) -> Path:
    """A copy of a rule file in which an hour is a minute."""
    content = yaml.safe_load(rules.read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            spans = re.compile(r"(?<![\w.])(\d+)(s|m|h)\b")
            rule["expr"] = spans.sub(lambda m: f"{_seconds(m)}s", rule["expr"])
            # Bare numbers of a minute and more are seconds, which stand beside time().
            rule["expr"] = re.sub(r"(?<![\w.])(\d{2,5})(?![\w.])", _scaled, rule["expr"])
            if "for" in rule:
                rule["for"] = spans.sub(lambda m: f"{_seconds(m)}s", rule["for"])
    copy = folder / rules.name
    copy.write_text(yaml.safe_dump(content))
    return copy


def _seconds(match: re.Match[str]) -> int:
    return max(1, int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] // FACTOR)


def _scaled(match: re.Match[str]) -> str:
    return str(int(match[1]) // FACTOR) if int(match[1]) >= 60 else match[1]


class Slowed:
    """A stream whose batches come late while a file says so."""

    def __init__(self, stream: Any, control: Path) -> None:
        self._stream, self._control = stream, control

    def __next__(self) -> Batch:
        if (self._control / "slow").exists():
            time.sleep(0.2)
        batch: Batch = next(self._stream)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def rank_of_a_faulty_run(rank: int, port: int, recipe: Recipe, control: Path) -> None:
    """Trains as the main job does, with faults that files in `control` turn on."""
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in env.items()})
    ranks: Ranks = read_ranks(os.environ)
    job = check(recipe, ranks)
    join(ranks)
    run = prepare(job, ranks)
    run.batches = Slowed(run.batches, control)  # type: ignore[assignment]
    model = run.engine.module
    forward: Callable[..., Any] = model.forward

    def faulty(*inputs: Any) -> Any:
        loss = forward(*inputs)
        if (control / "nan").exists():
            loss = loss * float("nan")
        return loss * 20 if (control / "steep").exists() else loss

    model.forward = faulty
    fit(run)
    run.observer.close(clean=True)
    run.batches.close()
    run.reporter.close()
    run.engine.destroy()
    leave(0)


@dataclass
class Watched:
    """A run and the Prometheus that watches it."""

    monitor: Monitor
    run_dir: Path
    control: Path
    shards: Path
    ranks: list[Any]

    def firing(self) -> set[str]:
        alerts = ask(f"{self.monitor.url}/api/v1/alerts")["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def value(self, expression: str) -> float:
        query = urllib.parse.urlencode({"query": expression})
        found = ask(f"{self.monitor.url}/api/v1/query?{query}")["data"]["result"]
        return float(found[0]["value"][1]) if found else 0.0

    def until(self, holds: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, (self.firing(), [rank.exitcode for rank in self.ranks])
            time.sleep(0.5)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk of its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    folder = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def watched(disk: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    needs("prometheus", "prometheus")
    needs("prometheus-alertmanager", "prometheus-alertmanager")
    folder = tmp_path_factory.mktemp("faults")
    copy, control, run_dir = folder / "shards", folder / "control", disk / "run"
    subprocess.run(["cp", "-r", str(shards), str(copy)], check=True)
    control.mkdir()
    changes = {"train.duration": "1000000 steps", "train.max_skipped_steps": 10**6, "data.max_bad_share": 0.99}
    recipe = tiny_recipe(
        **{**changes, "data.shards": str(copy), "run_dir": str(run_dir), "monitoring.port": 0, "optim.base_lr": 1e-6}
    )
    for name in ("rules.yml", "alerts.yml"):
        quick(local.HERE / name, folder)
    context, port = multiprocessing.get_context("spawn"), free_port()
    ranks = [
        context.Process(target=rank_of_a_faulty_run, args=(rank, port, recipe, control), daemon=False)
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    monitor = Monitor(find_programs(), [run_dir], folder / "data", free_port_from(19090), free_port_from(19190), "1s")
    rules = {str(local.HERE / name): str(folder / name) for name in ("rules.yml", "alerts.yml")}
    try:
        while not list((run_dir / "monitoring" / "targets").glob("*.json")):
            time.sleep(0.2)
        with monitor:
            config = monitor.data / "prometheus.yml"
            text = config.read_text()
            for shipped, scaled in rules.items():
                assert shipped in text
                text = text.replace(shipped, scaled)
            config.write_text(text)
            monitor._children["prometheus"].send_signal(signal.SIGHUP)
            yield Watched(monitor, run_dir, control, copy, ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def test_a_healthy_run_fires_nothing(watched: Watched) -> None:
    watched.until(lambda: watched.value("time() - max(mixmae_start_timestamp_seconds)") > 85)
    assert watched.value("count(mixmae_step)") == 2
    assert watched.firing() == set()


def switch(watched: Watched, fault: str, *alerts: str) -> None:
    """A fault is turned on until the alerts fire, then off until they do not."""
    (watched.control / fault).touch()
    watched.until(lambda: set(alerts) <= watched.firing())
    (watched.control / fault).unlink()
    watched.until(lambda: not set(alerts) & watched.firing(), 180)


def test_a_loader_that_is_slow(watched: Watched) -> None:
    switch(watched, "slow", "MixmaeDataWait", "MixmaeThroughputFell")


def test_losses_that_are_not_finite(watched: Watched) -> None:
    switch(watched, "nan", "MixmaeLossNotFinite", "MixmaeStepsSkipped")


def test_a_loss_that_rises(watched: Watched) -> None:
    switch(watched, "steep", "MixmaeLossRising", "MixmaeGradientNormJump")


def test_a_rank_that_hangs(watched: Watched) -> None:
    victim = watched.ranks[1].pid
    os.kill(victim, signal.SIGSTOP)
    watched.until(lambda: "MixmaeNoProgress" in watched.firing())
    os.kill(victim, signal.SIGCONT)
    watched.until(lambda: "MixmaeNoProgress" not in watched.firing())


def test_a_disk_that_fills_up(watched: Watched) -> None:
    filler = watched.run_dir.parent / "filler"
    free = os.statvfs(watched.run_dir).f_bavail * os.statvfs(watched.run_dir).f_frsize
    filler.write_bytes(b"\0" * (free - 2**20))
    watched.until(lambda: "MixmaeDiskNearlyFull" in watched.firing())
    filler.unlink()
    watched.until(lambda: "MixmaeDiskNearlyFull" not in watched.firing())


def test_shards_that_are_damaged(watched: Watched) -> None:
    sound = (watched.shards / "000000.tar").read_bytes()
    with (watched.shards / "000000.tar").open("r+b") as file:
        file.write(b"\0" * len(sound))
    watched.until(lambda: "MixmaeBadSamples" in watched.firing())
    with (watched.shards / "000000.tar").open("r+b") as file:
        file.write(sound)
    watched.until(lambda: "MixmaeBadSamples" not in watched.firing())


def test_an_exporter_that_is_killed(watched: Watched) -> None:
    """The run goes on; its node answers again with the next start, or is forgotten when the run is given up."""
    before = watched.value("max(mixmae_step)")
    assert before > 0
    subprocess.run(["pkill", "-9", "-f", f"monitoring.exporter.*{watched.run_dir}"], check=True)
    watched.until(lambda: "MixmaeExporterGone" in watched.firing())
    assert [rank.exitcode for rank in watched.ranks] == [None, None]
    for file in (watched.run_dir / "monitoring" / "targets").glob("*.json"):
        file.unlink()
    watched.until(lambda: "MixmaeExporterGone" not in watched.firing())
