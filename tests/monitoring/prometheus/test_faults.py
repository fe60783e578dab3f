"""Each alert fires on a real fault of a real two-rank run, is told to people by the real servers, and resolves.

Of GPUs only what their drivers say is made up. Restarts in a row have a test of their own.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
import yaml

from mixmae.monitoring.boards import BOARDS
from mixmae.monitoring.boards.panels import Board, Look
from mixmae.monitoring.prometheus.configuration import HERE
from tests.helpers import coloured_shards, tiny_recipe
from tests.monitoring.boards.test_dashboards import NOW, QUERIES, fill
from tests.monitoring.browser import visit
from tests.monitoring.exporter.test_server import fetch
from tests.monitoring.faulty_run import Control, faulty_run
from tests.monitoring.watching import Watching, watching

pytestmark = [pytest.mark.slow, pytest.mark.services, pytest.mark.timeout(3600)]
NODE = socket.gethostname()


@dataclass
class Run:
    """A run, what spoils it, and who watches it."""

    run_dir: Path
    shards: Path
    control: Control
    ranks: list[SpawnProcess]
    watching: Watching


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
def run(disk: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run whose second rank is held up before its first step."""
    folder = tmp_path_factory.mktemp("faults")
    copy, run_dir = folder / "shards", disk / "run"
    subprocess.run(["cp", "-r", str(shards), str(copy)], check=True)
    (folder / "control").mkdir()
    control = Control(folder / "control")
    control.set("no-engine-1", on=True)
    endless = {"train.duration": "1000000 steps", "train.max_skipped_steps": 10**6, "data.max_corrupt_fraction": 0.99}
    saving = {"checkpoint.every": "100 steps", "checkpoint.keep": 1, "checkpoint.max_failures": 10**6}
    telling = {
        "monitoring.port": 0,
        "monitoring.stall_seconds": 5.0,
        "monitoring.comms_logger": True,
        "monitoring.peak_flops": 1e12,
    }
    own = {"data.shards": str(copy), "run_dir": str(run_dir), "optim.base_lr": 1e-6}
    probe = {"shards": str(coloured_shards(folder / "coloured")), "every": "20 steps"}
    recipe = tiny_recipe(**{**endless, **saving, **telling, **own, "evaluate.probe": probe})
    with faulty_run(recipe, control) as ranks:

        def alive() -> bool:
            return all(rank.exitcode is None for rank in ranks)

        with watching([run_dir], folder / "data", alive) as watched:
            yield Run(run_dir, copy, control, ranks, watched)


def switch(run: Run, fault: str, *alerts: str) -> dict[str, str]:
    """A fault is turned on until alerts fire, then off until they do not; returns what people were told of them."""
    run.control.set(fault, on=True)
    run.watching.fire(*alerts)
    told = {alert: run.watching.summary(alert) for alert in alerts}
    run.control.set(fault, on=False)
    run.watching.resolve(*alerts)
    return told


def health(run: Run) -> tuple[int, str]:
    """What the exporter says to whoever asks only whether all is well."""
    (file,) = (run.run_dir / "monitoring" / "targets").glob("*.json")
    (target,) = json.loads(file.read_text())[0]["targets"]
    return fetch(f"http://{target}/healthz")


def test_a_rank_that_does_not_get_ready(run: Run) -> None:
    run.watching.fire("MixmaeNotTraining")
    assert run.watching.value('count(mixmae_rank_part{part="starting"} == 1)') == 2
    run.control.set("no-engine-1", on=False)
    run.watching.resolve("MixmaeNotTraining")


def test_a_healthy_run_fires_nothing(run: Run) -> None:
    run.watching.until(lambda: run.watching.value("time() - max(mixmae_start_timestamp_seconds)") > 85)
    assert run.watching.value("count(mixmae_step)") == 2
    assert run.watching.value("max(mixmae_checkpoint_seconds_count)") > 0
    assert run.watching.alerts() == {}
    assert health(run) == (200, "ok\n")


def test_a_loader_that_is_slow(run: Run) -> None:
    switch(run, "slow", "MixmaeDataWait", "MixmaeThroughputFell")


def test_losses_that_are_not_finite(run: Run) -> None:
    switch(run, "nan", "MixmaeLossNotFinite", "MixmaeStepsSkipped")


def test_a_loss_that_rises(run: Run) -> None:
    switch(run, "steep", "MixmaeLossRising", "MixmaeGradientNormJump")


def test_features_that_collapse(run: Run) -> None:
    switch(run, "collapse", "MixmaeProbeFalling")


def test_a_rank_that_gets_no_data_is_named(run: Run) -> None:
    """All hang in the same step: only the parts that they came to tell who holds up whom."""
    told = switch(run, "no-data-1", "MixmaeRankBehind", "MixmaeNoProgress")
    assert f"rank 1 on {NODE} hangs in data_wait" in told["MixmaeRankBehind"]
    assert f"rank 1 on {NODE} is behind" in told["MixmaeNoProgress"]


def test_a_rank_that_is_stopped_is_named(run: Run) -> None:
    victim = run.ranks[1].pid
    assert victim is not None
    os.kill(victim, signal.SIGSTOP)
    run.watching.fire("MixmaeRanksMissing", "MixmaeNoProgress")
    assert f"1 of its ranks do not run; rank 1 on {NODE} is one" in run.watching.summary("MixmaeRanksMissing")
    status, text = health(run)
    assert status == 503
    assert text.startswith("no step finished for 5 s: rank 0 (")
    os.kill(victim, signal.SIGCONT)
    run.watching.resolve("MixmaeRanksMissing", "MixmaeNoProgress")
    assert health(run) == (200, "ok\n")


def test_a_device_that_is_nearly_full(run: Run) -> None:
    told = switch(run, "full-device", "MixmaeDeviceMemoryNearLimit")
    assert f"a device of {NODE} holds 97.5% of its memory" in told["MixmaeDeviceMemoryNearLimit"]


def test_a_disk_that_fills_up(run: Run) -> None:
    """The run loses checkpoints and its record, and goes on; once there is room it saves again."""
    alerts = (
        "MixmaeDiskNearlyFull",
        "MixmaeNoRoomForCheckpoint",
        "MixmaeCheckpointFailed",
        "MixmaeCheckpointTooOld",
    )
    filler = run.run_dir.parent / "filler"
    full = subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], check=False, capture_output=True, text=True)
    assert "No space left" in full.stderr
    run.watching.fire(*alerts)
    filler.unlink()
    run.watching.resolve(*alerts)
    assert run.watching.value("max(mixmae_checkpoint_failures_total)") > 0


def test_shards_that_are_damaged(run: Run) -> None:
    sound = (run.shards / "000000.tar").read_bytes()
    with (run.shards / "000000.tar").open("r+b") as file:
        file.write(b"\0" * len(sound))
    run.watching.fire("MixmaeBadSamples")
    with (run.shards / "000000.tar").open("r+b") as file:
        file.write(sound)
    run.watching.resolve("MixmaeBadSamples")


def test_every_expression_of_every_dashboard_returns_data(run: Run) -> None:
    now = time.time()
    for board, panel, query in QUERIES:
        if panel.look is Look.ALERTS or panel.title == "Evaluation":  # none fires; a pretraining has probes alone
            continue
        expr = fill(query.expr, str(run.run_dir))
        found = run.watching.query(expr)
        if panel.look not in NOW:
            found = run.watching.query(expr, start=now - 60, end=now, step=5)
        assert found, f"{board.name}, {panel.title}: {expr}"


def test_every_recording_rule_returns_data(run: Run) -> None:
    groups = yaml.safe_load((HERE / "rules.yml").read_text())["groups"]
    for name in [rule["record"] for group in groups for rule in group["rules"]]:
        expected = not name.endswith(":stopped")  # of ranks that are
        assert bool(run.watching.query(f'{{__name__="{name}", run="{run.run_dir}"}}')) == expected, name


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_the_console_page_of_a_real_run_has_no_errors(run: Run, board: Board, tmp_path: Path) -> None:
    page = f"{run.watching.monitor.url}/consoles/mixmae.html"
    seen = visit(f"{page}?board={board.name}&run={quote(str(run.run_dir), safe='')}&range=15m", tmp_path)
    assert seen.console == []
    assert "mixmae_swin_nano, " in seen.dom
    assert "2 ranks" in seen.dom


def exporter_of(run: Run) -> psutil.Process | None:
    """The process that its rank has started last, if that runs."""
    children = psutil.Process(run.ranks[0].pid).children()
    return next((child for child in children if is_exporter(child)), None)


def is_exporter(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return "mixmae.monitoring.exporter.server" in process.cmdline()
    return False


def kill_exporter(run: Run) -> None:
    run.watching.until(lambda: exporter_of(run) is not None)
    exporter = exporter_of(run)
    assert exporter is not None
    exporter.kill()


def test_an_exporter_that_is_killed_comes_back(run: Run) -> None:
    """The first time at once, the second time after a minute, which here is as long as an hour: it is missed."""
    began = run.watching.value("max(mixmae_step)")
    for _ in range(2):
        kill_exporter(run)
    run.watching.fire("MixmaeExporterGone")
    assert [rank.exitcode for rank in run.ranks] == [None, None]
    run.watching.resolve("MixmaeExporterGone")
    run.watching.until(lambda: run.watching.value("max(mixmae_step)") > began > 0)
    assert health(run) == (200, "ok\n")
    run.watching.until(lambda: run.watching.alerts() == {})
