import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from mixmae.base.errors import UsageError
from mixmae.base.ports import free_port, free_port_from
from mixmae.launch.commands import monitor as command
from mixmae.monitoring.exporter.access import PLAIN, Access
from mixmae.monitoring.exporter.discovery import write_target
from mixmae.monitoring.exporter.recorder import Recorder
from mixmae.monitoring.exporter.server import Exporter, Settings
from mixmae.monitoring.prometheus import local
from mixmae.monitoring.prometheus.configuration import configuration, find_runs, run_dirs
from mixmae.monitoring.prometheus.local import Monitor, MonitorError, Programs, find_programs
from tests.certificates import certify
from tests.helpers import ROOT
from tests.monitoring.services import needs

RUN = "import sys; from mixmae.base.errors import run_cli; from mixmae.launch.commands.monitor import main; "
RUN += "sys.exit(run_cli(main, sys.argv[1:]))"


@pytest.fixture
def programs() -> Programs:
    needs("prometheus", "prometheus")
    needs("prometheus-alertmanager", "prometheus-alertmanager")
    return find_programs()


@pytest.fixture
def exporter() -> Iterator[tuple[str, Gauge]]:
    """An exporter's address, and the loss that it shows."""
    registry = CollectorRegistry()
    Gauge("mixmae_start_timestamp_seconds", "", registry=registry).set_to_current_time()
    loss = Gauge("mixmae_loss", "", registry=registry)
    loss.set(0.5)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"127.0.0.1:{server.server_port}", loss
    server.shutdown()
    server.server_close()
    thread.join()


def ask(url: str) -> Any:
    with local._DIRECT.open(url, timeout=10) as answer:
        return json.load(answer)


def query(monitor: Monitor, expression: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(f"{monitor.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")[
        "data"
    ]["result"]
    return found


def eventually(what: Callable[[], Any], seconds: float = 200) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.services
def test_a_run_is_scraped_and_its_alert_arrives(
    programs: Programs, exporter: tuple[str, Gauge], tmp_path: Path
) -> None:
    address, loss = exporter
    runs = tmp_path / "runs"
    runs.mkdir()
    with Monitor(programs, [runs], tmp_path / "data", free_port(), free_port(), interval="1s") as monitor:
        pids = [child.pid for child in monitor._children.values()]
        assert query(monitor, "mixmae_loss") == []
        write_target(runs / "first", "n1", address)  # a run that begins below the folder
        monitor.update()
        recorded = eventually(lambda: query(monitor, "run:mixmae_loss:finite"))
        assert [(sample["metric"]["run"], sample["value"][1]) for sample in recorded] == [(str(runs / "first"), "0.5")]
        assert query(monitor, "mixmae_loss")[0]["metric"]["node"] == "n1"
        loss.set(float("nan"))
        alerts = eventually(lambda: ask(f"{monitor.alertmanager_url}/api/v2/alerts"))
        assert [alert["labels"]["alertname"] for alert in alerts] == ["MixmaeLossNotFinite"]
        assert alerts[0]["annotations"]["summary"] == f"Run {runs / 'first'}: the loss is NaN"
        monitor.check()
    assert not any(map(alive, pids))


@contextmanager
def guarded_run(run_dir: Path, auth: str) -> Iterator[Path]:
    """An exporter over TLS with a password; gives its certificate."""
    run_dir.mkdir(parents=True)
    (cert, key), auth_file = certify(run_dir), run_dir / "auth"
    auth_file.write_text(auth)
    Recorder(run_dir / "shared", 0).set("step", 3)
    exporter = Exporter(Settings(run_dir / "shared", run_dir, "127.0.0.1", 0, 60.0, cert, key, auth_file))
    write_target(run_dir, "n1", exporter.target, "https")
    yield cert
    exporter.close()


@pytest.mark.services
def test_runs_are_scraped_over_tls_with_the_readers_certificates_and_password(
    programs: Programs, exporter: tuple[str, Gauge], tmp_path: Path
) -> None:
    write_target(tmp_path / "plain", "n1", exporter[0])
    with guarded_run(tmp_path / "guarded", "me:it: is") as one, guarded_run(tmp_path / "closed", "me:a") as other:
        (tmp_path / "auth").write_text("me:it: is")
        (tmp_path / "certificates").write_text(one.read_text() + other.read_text())
        access = Access(tmp_path / "certificates", tmp_path / "auth")
        folders = [tmp_path / name for name in ("plain", "guarded", "closed")]
        with Monitor(programs, folders, tmp_path / "data", free_port(), free_port(), "1s", access) as monitor:

            def states() -> dict[str, str]:
                found = ask(f"{monitor.url}/api/v1/targets")["data"]["activeTargets"]
                return {Path(target["labels"]["run"]).name: target["health"] for target in found}

            eventually(lambda: states() == {"plain": "up", "guarded": "up", "closed": "down"})
            (step,) = eventually(lambda: query(monitor, "mixmae_step"))
            assert (Path(step["metric"]["run"]).name, step["value"][1]) == ("guarded", "3")
            assert {one["metric"]["job"] for one in query(monitor, "up")} == {"mixmae"}
            assert (tmp_path / "data" / "password").stat().st_mode & 0o777 == 0o600
            assert "it: is" not in monitor.configuration


def target(**changes: Any) -> str:
    return json.dumps([{"targets": ["localhost:1"], "labels": {"node": "n", "run": "other"}} | changes])


BAD_TARGETS = {
    "no JSON": "{",
    "nested without end": "[" * 100_000,
    "bytes": b"\xff\xfe",
    "another form": '{"targets": 1}',
    "no node": target(labels={}),
    "a path": target(targets=["localhost:1/secret?x="]),
    "a password": target(targets=["user:word@localhost:1"]),
    "an option": target(targets=["-localhost:1"]),
    "a scheme": target(labels={"node": "n", "__scheme__": "file"}),
    "a long name": target(labels={"node": "n" * 10_000}),
    "a number": target(targets=[1]),
}


@pytest.mark.parametrize("content", BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_a_bad_run_is_named_and_keeps_no_other_from_being_watched(content: str | bytes, tmp_path: Path) -> None:
    write_target(tmp_path / "good", "n1", "localhost:2")
    file = write_target(tmp_path / "bad", "n1", "localhost:1")
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    runs, (note,) = find_runs([tmp_path], PLAIN)
    assert list(runs) == [tmp_path / "good"]
    assert note.startswith(f"{file} is no Prometheus target file; remove it")
    assert "\n" not in note


def test_a_run_directory_decides_on_addresses_alone(tmp_path: Path) -> None:
    """Names, other labels, files that are none: none of it reaches Prometheus or keeps a reader waiting."""
    for name in ("x*y", "x[1]", "x\\y", "x\ny"):
        write_target(tmp_path / name, "n1", "localhost:1")
    labels = {"node": "n", "run": "somebody", "job": "node", "__metrics_path__": "/x", "__param_q": "x"}
    write_target(tmp_path / "forged", "n1", "localhost:1").write_text(target(labels=labels))
    os.mkfifo(write_target(tmp_path / "fifo", "n1", "localhost:1").with_name("n2.json"))
    (tmp_path / "fifo" / "monitoring" / "targets" / "n3.json").symlink_to("/dev/zero")
    (tmp_path / "secret").write_text("me:word")
    recipe = {
        "encoder": {},
        "train": {},
        "monitoring": {"auth_file": str(tmp_path / "secret"), "certfile": "/dev/zero"},
    }
    (tmp_path / "forged" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_target(tmp_path / "secure", "n1", "localhost:1", "https")
    monitor = Monitor(Programs("prometheus", None), [tmp_path], tmp_path / "data", 1, 2)
    monitor.data.mkdir()
    monitor.update()
    written = (tmp_path / "data" / "targets-http.json").read_text()
    assert {group["labels"]["run"] for group in json.loads(written)} == {
        str(tmp_path / name) for name in ("x*y", "x[1]", "x\\y", "x\ny", "forged", "fifo")
    }
    assert all(set(group["labels"]) == {"run", "node"} for group in json.loads(written))
    assert "secret" not in monitor.configuration + written
    assert "follow_redirects: false" in monitor.configuration
    assert [Path(note.split()[0]).name for note in monitor.notes] == ["n2.json", "n3.json", "secure"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--auth-file", "auth"], "--auth-file auth would go to whatever address a run directory names"),
        (["--auth-file", "nowhere", "--certfile", "cert"], "--auth-file nowhere cannot be read"),
        (["--certfile", "auth"], "--certfile auth cannot be used"),
    ],
)
def test_the_readers_files_are_checked_first(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "auth").write_text("me:word")
    with pytest.raises(UsageError, match=message):
        command.main(["up", ".", *options])


@pytest.mark.services
def test_a_server_that_cannot_start_says_why_and_leaves_none(programs: Programs, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monitor = Monitor(programs, [tmp_path], tmp_path / "data", taken.getsockname()[1], free_port())
        with pytest.raises(MonitorError, match=r"prometheus ended with 1 .*address already in use"), monitor:
            pass
    assert not any(alive(child.pid) for child in monitor._children.values())


@pytest.mark.services
def test_the_command_runs_until_it_is_interrupted(programs: Programs, tmp_path: Path) -> None:
    first, second = free_port(), free_port()
    argv = ["up", str(tmp_path / "run"), "--port", str(first), "--alertmanager-port", str(second)]
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert child.stdout is not None
    shown = []
    for line in child.stdout:
        shown.append(line)
        if line.startswith("waiting"):
            break
    assert f"runs          http://127.0.0.1:{first}/consoles/mixmae.html\n" in shown
    assert shown[-1] == f"waiting for a run to begin in {tmp_path / 'run'}\n"
    with local._DIRECT.open(f"http://127.0.0.1:{first}/consoles/mixmae.html", timeout=10) as page:
        assert b"mixmae" in page.read()
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=200)[0].endswith("ended\n")
    assert child.returncode == 0
    assert list(tmp_path.glob("mixmae-monitor-*")) == []
    for port in (first, second):
        assert free_port_from(port) == port


def test_the_shipped_configuration_is_used_for_these_runs(tmp_path: Path) -> None:
    write_target(tmp_path / "runs" / "b", "n1", "localhost:1")
    write_target(tmp_path / "runs" / "a", "n1", "localhost:2")
    folders = [tmp_path / "runs", tmp_path / "runs" / "a", tmp_path / "new"]
    content = yaml.safe_load(configuration(tmp_path, PLAIN, 9999))
    assert content["global"]["scrape_interval"] == "5s"
    assert [Path(file).is_file() for file in content["rule_files"]] == [True, True]
    assert content["alerting"]["alertmanagers"] == [{"static_configs": [{"targets": ["127.0.0.1:9999"]}]}]
    (job,) = content["scrape_configs"]
    assert job["job_name"] == "mixmae"
    assert job["file_sd_configs"] == [{"files": [f"{tmp_path}/targets-http.json"], "refresh_interval": "5s"}]
    assert run_dirs(folders) == [tmp_path / name for name in ("runs", "runs/a", "runs/b", "new")]
    assert list(find_runs(folders, PLAIN)[0]) == [tmp_path / "runs" / "a", tmp_path / "runs" / "b"]
    assert "alerting" not in yaml.safe_load(configuration(tmp_path, PLAIN, None))


def test_the_next_free_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        found = free_port_from(taken)
        assert found > taken
        assert free_port_from(taken, [found]) > found


@pytest.mark.parametrize("name", ["alertmanager", "prometheus-alertmanager"])
def test_programs_are_found_by_either_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MonitorError, match=r"apt-get install prometheus .*https://prometheus\.io/download"):
        find_programs()
    program(tmp_path / "prometheus")
    assert find_programs() == Programs(str(tmp_path / "prometheus"), None)
    program(tmp_path / name)
    assert find_programs().alertmanager == str(tmp_path / name)


def program(file: Path) -> None:
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)


def test_a_dry_run_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path / "prometheus")
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        argv = ["up", str(tmp_path), "--port", str(taken), "--data", str(tmp_path / "data"), "--dry-run"]
        assert command.main(argv) == 0
    shown = capsys.readouterr().out
    assert "Alertmanager is not on PATH" in shown
    assert f"port {taken} is taken: Prometheus gets " in shown
    assert f"{tmp_path}/prometheus --config.file={tmp_path}/data/prometheus.yml" in shown
    assert f"- {tmp_path}/data/targets-http.json" in shown
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "0"], "port 0 for Prometheus: expected 1 to 65535"),
        (["--alertmanager-port", "70000"], "port 70000 for Alertmanager: expected 1 to 65535"),
        (["--data", "file/data"], "file/data cannot be written to: Not a directory"),
        (["file"], "file is a file; expected a run directory"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, tmp_path: Path) -> None:
    for name in ("prometheus", "alertmanager"):
        program(tmp_path / name)
    (tmp_path / "file").touch()
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "up", ".", *argv],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_prometheus_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "up", "."],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("mixmae: error: the program prometheus is not on PATH; get it with 'apt-get install")
    assert len(done.stderr.splitlines()) == 1
