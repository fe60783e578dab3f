"""What a short run leaves on a real Pushgateway, and what a real Prometheus makes of it."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from mixmae.base.ports import free_port
from mixmae.monitoring.exporter.server import ENDED_JOB
from mixmae.monitoring.prometheus.local import Monitor, find_programs
from tests.helpers import ROOT, tiny_recipe
from tests.monitoring.prometheus.test_local import ask, eventually, query
from tests.monitoring.services import needs
from tests.warm import WarmProcess, run_module

pytestmark = pytest.mark.services
TRAIN = "mixmae.trainer.train"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program, port = needs("prometheus-pushgateway", package="prometheus-pushgateway"), free_port()
    output = tmp_path_factory.mktemp("gateway") / "log"
    with output.open("wb") as log:
        options = [f"--web.listen-address=127.0.0.1:{port}", "--persistence.file="]  # Debian's would have earlier runs
        server = subprocess.Popen([program, *options], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: answers(f"{url}/-/ready"))
        yield url
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url).close()
    except OSError:
        return False
    return True


def pushed(gateway: str) -> dict[str, list[dict[str, Any]]]:
    """The gateway's samples of runs, by name."""
    text = urllib.request.urlopen(f"{gateway}/metrics").read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        if sample.labels.get("job") == ENDED_JOB:
            found.setdefault(sample.name, []).append({**sample.labels, "value": sample.value})
    return found


def groups(gateway: str) -> list[dict[str, str]]:
    content = json.load(urllib.request.urlopen(f"{gateway}/api/v1/metrics"))
    return [group["labels"] for group in content["data"]]


@pytest.fixture(scope="module")
def recipe(gateway: str, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pushed")
    changes = {"data.shards": str(shards), "run_dir": str(folder / "run"), "monitoring.port": 0}
    (folder / "recipe.yaml").write_text(tiny_recipe(**{**changes, "monitoring.pushgateway": gateway}).to_yaml())
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def group(recipe: Path) -> dict[str, str]:
    """By which the gateway knows the run."""
    return {"job": ENDED_JOB, "run": str(recipe.parent / "run"), "node": socket.gethostname()}


@pytest.fixture(scope="module")
def ended(recipe: Path) -> None:
    """A run of seconds, which no Prometheus would have seen."""
    assert run_module(TRAIN, str(recipe)).returncode == 0


def test_the_last_numbers_of_a_run_arrive(gateway: str, group: dict[str, str], ended: None) -> None:
    assert groups(gateway) == [group]
    found = pushed(gateway)
    assert all(group.items() <= sample.items() for samples in found.values() for sample in samples)
    assert [(one["rank"], one["value"]) for one in found["mixmae_step"]] == [("0", 8.0)]
    assert found["mixmae_images_total"][0]["value"] == 64
    assert found["mixmae_step_seconds_count"][0]["value"] == 7
    assert 0 < found["mixmae_loss"][0]["value"] < 10
    assert found["mixmae_checkpoint_seconds_count"][0]["value"] == 1
    assert found["mixmae_run_info"][0]["encoder"] == "mixmae_swin_nano"


def evaluations(monitor: Monitor) -> list[float]:
    """When each group of rules was evaluated last."""
    groups = ask(f"{monitor.url}/api/v1/rules")["data"]["groups"]
    return [datetime.fromisoformat(group["lastEvaluation"]).timestamp() for group in groups]


def test_prometheus_keeps_their_labels_and_alarms_nobody(
    gateway: str, group: dict[str, str], ended: None, tmp_path: Path
) -> None:
    needs("prometheus", package="prometheus")
    shipped = (ROOT / "monitoring" / "prometheus.yml").read_text()
    commented = (
        shipped[shipped.index("  # - job_name: mixmae_ended") :].replace("  # ", "").replace("localhost:9091", "")
    )
    (job,) = yaml.safe_load(commented)
    job["static_configs"][0]["targets"] = [gateway.removeprefix("http://")]

    class WithGateway(Monitor):
        @property
        def configuration(self) -> str:
            content = yaml.safe_load(super().configuration)
            content["scrape_configs"].append(job)
            return yaml.safe_dump(content)

    with WithGateway(
        find_programs(), [tmp_path / "none"], tmp_path / "data", free_port(), free_port(), "1s"
    ) as monitor:
        (step,) = eventually(lambda: query(monitor, "mixmae_step"))
        assert {**group, "rank": "0"}.items() <= step["metric"].items()
        assert step["value"][1] == "8"
        seen = time.time()
        eventually(lambda: all(last > seen for last in evaluations(monitor)))
        assert query(monitor, '{__name__=~"run.*:mixmae_.*"}') == []
        assert query(monitor, "ALERTS") == []


def test_a_second_start_takes_them_back_and_its_end_brings_the_new(
    gateway: str, recipe: Path, group: dict[str, str], ended: None
) -> None:
    """Of a run in the same directory: the gateway knows it by that."""
    before = pushed(gateway)
    run_dir, again = recipe.parent / "run", [str(recipe)]
    shutil.rmtree(run_dir)
    with WarmProcess(TRAIN, *again, "train.duration=100000 steps", env=os.environ):
        eventually(lambda: groups(gateway) == [] and (run_dir / "events.jsonl").exists())
    assert run_module(TRAIN, *again, "train.duration=4 steps").returncode == 0
    after = pushed(gateway)
    assert groups(gateway) == [group]
    assert {name: len(samples) for name, samples in after.items()} == {name: len(s) for name, s in before.items()}
    assert [one["value"] for one in after["mixmae_step"]] == [4.0]
    assert [one["value"] for one in after["mixmae_resumes_total"] if one["reason"] == "killed"] == [1]


def test_a_gateway_that_does_not_answer_costs_a_line(recipe: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    overrides = (f"run_dir={tmp_path / 'run'}", f"monitoring.pushgateway={url}")
    done = run_module(TRAIN, str(recipe), *overrides)
    assert done.returncode == 0
    told = [line for line in done.stderr.splitlines() if "pushgateway" in line]
    assert len(told) == 2  # at the start, and at the end
    assert all(line.startswith(f"mixmae: monitoring.pushgateway={url} accepts no metrics") for line in told)
    assert "Traceback" not in done.stderr
