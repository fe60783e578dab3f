import base64
import errno
import json
import os
import re
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mixmae.base.run_directory import targets_folder
from mixmae.monitoring.exporter import http_server
from mixmae.monitoring.exporter.discovery import remove_targets, write_target
from mixmae.monitoring.exporter.recorder import Recorder, read_ranks
from mixmae.monitoring.exporter.server import Exporter, ExporterError, Settings
from tests.certificates import certify


@contextmanager
def exporter(tmp_path: Path, clock: Any = time.time, **changes: Any) -> Iterator[Exporter]:
    (tmp_path / "run").mkdir(exist_ok=True)
    started = Exporter(Settings(tmp_path / "shared", tmp_path / "run", **{"port": 0, **changes}), clock)
    try:
        yield started
    finally:
        started.close()


def fetch(url: str, headers: dict[str, str] | None = None, context: ssl.SSLContext | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_numbers_of_all_ranks_come_out(tmp_path: Path) -> None:
    for rank in (0, 1):
        recorder = Recorder(tmp_path / "shared", rank)
        recorder.set("step", 10 + rank)
        recorder.add("images_total", 256)
        recorder.observe("step_part_seconds", 0.03, "forward")
        recorder.observe("step_part_seconds", 0.3, "forward")
        recorder.set("replaced_samples_total", 2, "empty")
    recorder.set("loss", float("nan"))
    with exporter(tmp_path) as running:
        status, text = fetch(running.url)
    found = samples(text)
    assert status == 200
    assert found["mixmae_step", (("rank", "1"),)] == 11
    assert found["mixmae_images_total", (("rank", "0"),)] == 256
    assert found["mixmae_replaced_samples_total", (("rank", "0"), ("reason", "empty"))] == 2
    part = (("part", "forward"), ("rank", "0"))
    assert found["mixmae_step_part_seconds_count", part] == 2
    assert found["mixmae_step_part_seconds_sum", part] == pytest.approx(0.33)
    assert found["mixmae_step_part_seconds_bucket", (("le", "0.05"), *part)] == 1
    assert found["mixmae_node_memory_total_bytes", ()] > 2**30
    assert found["mixmae_run_dir_free_bytes", ()] > 0
    assert found["mixmae_loss", ()] != found["mixmae_loss", ()]
    assert "# TYPE mixmae_images_total counter" in text


def test_health_fails_when_no_step_was_finished_for_long(tmp_path: Path) -> None:
    now = 1000.0
    recorders = [Recorder(tmp_path / "shared", rank) for rank in (0, 3)]
    with exporter(tmp_path, clock=lambda: now, stall_seconds=60.0) as running:
        url = running.url.replace("/metrics", "/healthz")
        assert fetch(url) == (200, "ok\n")
        now = 1050.0
        recorders[0].set("heartbeat_timestamp_seconds", now)
        now = 1070.0
        assert fetch(url) == (503, "no step finished for 60 s: rank 3 (70 s)\n")
        recorders[1].set("heartbeat_timestamp_seconds", now)
        assert fetch(url)[0] == 200


def test_a_taken_port_is_stepped_over(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with exporter(tmp_path, port=taken) as running:
            assert int(running.target.split(":")[1]) > taken
            assert fetch(running.url)[0] == 200


def test_a_silent_client_keeps_nobody_out(tmp_path: Path) -> None:
    with exporter(tmp_path) as running:
        host, port = running.target.split(":")
        with socket.create_connection((host, int(port))), socket.create_connection((host, int(port))) as half:
            half.sendall(b"GET /metrics HTTP/1.1\r\n")
            assert fetch(running.url)[0] == 200


def test_basic_auth(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("prometheus:secret\n")
    with exporter(tmp_path, auth_file=tmp_path / "auth") as running:
        assert fetch(running.url)[0] == 401
        for given, status in (("prometheus:secret", 200), ("prometheus:other", 401)):
            header = {"Authorization": "Basic " + base64.b64encode(given.encode()).decode()}
            assert fetch(running.url, header)[0] == status
        assert fetch(running.url, {"Authorization": "Basic \xff"})[0] == 401


def test_tls(tmp_path: Path) -> None:
    cert, key = certify(tmp_path)
    with exporter(tmp_path, certfile=cert, keyfile=key) as running:
        host, port = running.target.split(":")
        assert running.url.startswith("https://")
        with socket.create_connection((host, int(port))):  # says nothing, not even hello
            assert fetch(running.url, context=ssl.create_default_context(cafile=str(cert)))[0] == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": "no.such.host.invalid"}, "monitoring.address"),
        ({"auth_file": Path("nowhere")}, "monitoring.auth_file=nowhere cannot be read"),
        ({"auth_file": Path("binary")}, "monitoring.auth_file=binary is not UTF-8 text"),
        ({"auth_file": Path("lines")}, "monitoring.auth_file=lines: expected one line, user:password"),
        ({"auth_file": Path("fifo")}, "monitoring.auth_file=fifo cannot be read: fifo is a FIFO"),
        ({"certfile": Path("nowhere")}, "monitoring.certfile=nowhere"),
        ({"certfile": Path("cert.pem"), "keyfile": Path("key.pem")}, r"keyfile=key\.pem cannot be used"),
    ],
)
def test_mistakes_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe:\n")
    Path("lines").write_text("a:b\nc:d\n")
    certify(tmp_path, passphrase=b"asked of a terminal")
    os.mkfifo("fifo")
    with pytest.raises(ExporterError, match=message), exporter(tmp_path, **changes):
        pass


def test_other_paths_say_which_there_are(tmp_path: Path) -> None:
    with exporter(tmp_path) as running:
        assert fetch(running.url.replace("/metrics", "/")) == (404, "/metrics or /healthz\n")


@pytest.mark.parametrize("words", [b"", b"GET /metrics HTTP/1.1\r\n"], ids=["nothing", "half a request"])
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_a_client_that_is_left_is_no_news(
    words: bytes, secure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mixmae.monitoring.exporter.http_server._QuietHandler.timeout", 0.1)
    certificate = dict(zip(("certfile", "keyfile"), certify(tmp_path), strict=True)) if secure else {}
    with exporter(tmp_path, **certificate) as running:
        host, port = running.target.split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(words)
            while client.recv(1000):
                pass  # until it is left
    assert capfd.readouterr() == ("", "")


def recv_all(client: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionError):
        while part := client.recv(1000):
            received += part
    return received


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_clients_that_trickle_are_left_and_keep_nobody_out(
    secure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than connections, each of which says a byte now and then."""
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 8)
    certificate = dict(zip(("certfile", "keyfile"), certify(tmp_path), strict=True)) if secure else {}
    context = ssl.create_default_context(cafile=str(certificate["certfile"])) if secure else None
    with exporter(tmp_path, **certificate) as running, ExitStack() as stack:
        host, port = running.target.split(":")
        slow = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(20)]
        for _ in range(3):
            for client in slow:
                with suppress(OSError):
                    client.send(b"G")
            assert fetch(running.url, context=context)[0] == 200
        assert recv_all(slow[0]) == b""  # the oldest are left first
        monkeypatch.setattr(http_server.HttpServer, "deadline", 0.0)
        assert recv_all(slow[-1]) == b""


def test_an_exporter_without_descriptors_answers_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[int] = []

    def accept(self: Any) -> Any:
        if len(refused) < 2:
            refused.append(1)
            raise OSError(errno.EMFILE, "too many open files")
        return original(self)

    original = socketserver.TCPServer.get_request
    monkeypatch.setattr(socketserver.TCPServer, "get_request", accept)
    with exporter(tmp_path) as running:
        assert fetch(running.url)[0] == 200
    assert len(refused) == 2


@pytest.mark.parametrize(
    ("address", "target"),
    [("::1", r"\[::1\]:\d+"), ("::", rf"{socket.gethostname()}:\d+"), ("localhost", r"localhost:\d+")],
)
def test_it_listens_where_it_is_told(address: str, target: str, tmp_path: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with exporter(tmp_path, address=address) as running:
        assert re.fullmatch(target, running.target)
        port = running.target.rpartition(":")[2]
        for host in ("[::1]", "127.0.0.1") if address == "::" else (f"[{address}]" if ":" in address else address,):
            assert fetch(f"http://{host}:{port}/metrics")[0] == 200
        assert running.settings.address == address


def start_process(tmp_path: Path, *more: str, output: int | None = None) -> subprocess.Popen[bytes]:
    (tmp_path / "run").mkdir(exist_ok=True)
    Recorder(tmp_path / "shared", 0).set("step", 1)
    options = ["--shared", str(tmp_path / "shared"), "--run-dir", str(tmp_path / "run"), "--port", "0", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "mixmae.monitoring.exporter.server", *options], stdout=output, stderr=output
    )


def wait_for_target(run_dir: Path) -> dict[str, Any]:
    deadline = time.monotonic() + 200
    while not (files := list(targets_folder(run_dir).glob("*.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (content,) = json.loads(files[0].read_text())
    return dict(content)


def test_a_clean_end_takes_the_target_away(tmp_path: Path) -> None:
    process = start_process(tmp_path)
    target = wait_for_target(tmp_path / "run")
    assert target["labels"] == {"run": str(tmp_path / "run"), "node": socket.gethostname()}
    assert fetch(f"http://{target['targets'][0]}/metrics")[0] == 200
    process.terminate()
    assert process.wait(200) == 0
    assert not list(targets_folder(tmp_path / "run").glob("*.json"))
    assert [*read_ranks(tmp_path / "shared")]  # for an exporter that its rank may start instead


def full_pipe() -> tuple[int, int]:
    """A pipe that takes no more: its reader hangs."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"\0" * 4096)
    os.set_blocking(writer, True)
    return reader, writer


def test_words_that_nobody_reads_hold_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter's output is its rank's, mostly a pipe to a launcher; it has news at its start and at its end."""
    reader, writer = full_pipe()
    monkeypatch.setenv("MIXMAE_PUSHGATEWAY", "http://me:word@127.0.0.1:1")
    process = start_process(tmp_path, output=writer)
    os.close(writer)
    target = wait_for_target(tmp_path / "run")
    assert fetch(f"http://{target['targets'][0]}/metrics")[0] == 200
    process.terminate()
    assert process.wait(200) == 0
    assert not list(targets_folder(tmp_path / "run").glob("*.json"))
    os.close(reader)


def test_a_reader_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start_process(tmp_path, output=writer)
    os.close(writer)
    target = wait_for_target(tmp_path / "run")
    assert fetch(f"http://{target['targets'][0]}/metrics")[0] == 200
    process.terminate()
    assert process.wait(200) == 0


def test_a_rank_that_was_gone_before_its_exporter_looked_is_missed(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as rank:
        pass
    process = start_process(tmp_path, "--parent", str(rank.pid))
    assert process.wait(200) == 0
    assert wait_for_target(tmp_path / "run")
    assert not (tmp_path / "shared").exists()


def test_a_crash_leaves_the_target_for_prometheus_to_miss(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-m', 'mixmae.monitoring.exporter.server', '--shared',"
        f" {str(tmp_path / 'shared')!r}, '--run-dir', {str(tmp_path / 'run')!r}, '--port', '0']); time.sleep(100)"
    )
    (tmp_path / "run").mkdir()
    rank = subprocess.Popen([sys.executable, "-c", code])
    target = wait_for_target(tmp_path / "run")["targets"][0]
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            fetch(f"http://{target}/healthz")
            time.sleep(0.1)
        except OSError:
            break
    else:
        pytest.fail("the exporter outlived its rank")
    assert wait_for_target(tmp_path / "run")["targets"] == [target]


def test_targets_of_an_earlier_start_are_forgotten(tmp_path: Path) -> None:
    file = write_target(tmp_path, "node7", "10.0.0.7:9400")
    assert json.loads(file.read_text())[0]["labels"]["node"] == "node7"
    remove_targets(tmp_path)
    assert not file.exists()
    assert os.listdir(file.parent) == []  # noqa: PTH208
