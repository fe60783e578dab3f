"""A real Prometheus with a past and a present: fake runs backfilled by promtool, and scraped from then on."""

import json
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from mixmae.base.ports import free_port
from tests.helpers import ROOT
from tests.monitoring.fake_run import FakeRun, history, served, target_files

# A name that ships, with a threshold at which it fires on fake runs at once: what is told of it stands in pictures.
RULES = """
groups:
  - name: test
    rules:
      - alert: MixmaeDeviceMemoryNearLimit
        expr: mixmae_device_memory_peak_bytes / mixmae_device_memory_limit_bytes > 0.84
        labels: {severity: warning}
        annotations: {summary: "rank {{ $labels.rank }}: {{ $value | humanizePercentage }} of its device's memory"}
"""


class Prometheus:
    """Asks a Prometheus server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, **parameters: Any) -> Any:
        with urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}") as answer:
            return json.load(answer)["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("query", query=expr)["result"]
        return found

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("query_range", query=expr, start=start, end=end, step=step)["result"]
        return found


@contextmanager
def prometheus(
    folder: Path, past: Iterable[tuple[Sequence[FakeRun], Sequence[float]]], live: Sequence[FakeRun]
) -> Iterator[Prometheus]:
    """Prometheus with the console page; `past` gives runs and the times at which they were scraped."""
    with ExitStack() as stack:
        targets = {run.name: stack.enter_context(served(run, time.time)) for run in live}
        for number, (runs, times) in enumerate(past):
            lines = history([(run, targets.get(run.name) or dict.fromkeys(run.nodes, "gone:1")) for run in runs], times)
            _backfill(folder, number, lines)
        for run in live:
            for node, content in target_files(run, targets[run.name]).items():
                (folder / "targets").mkdir(exist_ok=True)
                (folder / "targets" / f"{run.name}-{node}.json").write_text(json.dumps(content))
        nodes = sum(len(run.nodes) for run in live)
        asked = stack.enter_context(_server(folder))
        wait_until(lambda: [t["health"] for t in asked.ask("targets")["activeTargets"]] == ["up"] * nodes)
        wait_until(lambda: len(asked.query('ALERTS{alertstate="firing"}')) >= len(live))
        yield asked


def _backfill(folder: Path, number: int, lines: Iterator[str]) -> None:
    text = folder / f"past-{number}.txt"
    with text.open("w") as file:
        file.writelines(lines)
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(text), str(folder / "tsdb")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    text.unlink()


@contextmanager
def _server(folder: Path) -> Iterator[Prometheus]:
    (folder / "rules.yml").write_text(RULES)
    (folder / "prometheus.yml").write_text(
        f"""
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [rules.yml]
scrape_configs:
  - job_name: mixmae
    file_sd_configs: [{{files: ["{folder}/targets/*.json"]}}]
"""
    )
    port = free_port()
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "tsdb",
        "web.listen-address": f"127.0.0.1:{port}",
        "web.console.templates": ROOT / "monitoring" / "consoles",
        "log.level": "error",
    }
    server = subprocess.Popen(["prometheus", *(f"--{name}={value}" for name, value in options.items())])
    try:
        asked = Prometheus(port)
        wait_until(lambda: bool(asked.query("vector(1)")))
        yield asked
    finally:
        server.terminate()
        server.wait()


def wait_until(holds: Callable[[], bool], seconds: float = 200) -> None:
    """Raises AssertionError if it does not hold in time; a server that does not listen yet is waited for."""
    end = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except URLError:
            pass
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
