import json
import math
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from rich.console import Console

from mixmae.launch.commands.watch_frame import frame
from mixmae.monitoring.exporter.access import PLAIN, Access
from mixmae.monitoring.exporter.discovery import write_target
from mixmae.monitoring.metrics import METRICS, STEP_BUCKETS, Kind
from mixmae.monitoring.watch.alerts import parse_alerts
from mixmae.monitoring.watch.history import Log, State, Tail
from mixmae.monitoring.watch.poller import Poller
from mixmae.monitoring.watch.scrape import Endpoint, Rank, Scrape, parse_scrape, reachable
from mixmae.monitoring.watch.text import (
    ASCII_BLOCKS,
    BLOCKS,
    NOT_FINITE,
    amount,
    chart,
    duration,
    sanitize,
    size,
    wrap_items,
)
from mixmae.monitoring.watch.view import View, WatchedEndpoint, WatchedRun, WatchError, events_of
from mixmae.trainer.tasks.registry import task_of
from tests.certificates import ELSEWHERE, certify
from tests.helpers import tiny_recipe

NOW = 1_000_000.0
numbers = st.floats(allow_nan=True, allow_infinity=True)


@pytest.fixture(autouse=True)
def polling_ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever watches does so until its process ends: here, until its test does."""
    started = []

    class Stopped(Poller):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            started.append(self)

    monkeypatch.setattr("mixmae.monitoring.watch.view.Poller", Stopped)
    yield
    for poller in started:
        poller.stop()


def event(kind: str, step: int, when: float, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": when, "step": step, **fields}


def log_of(*events: dict[str, Any]) -> Log:
    log = Log()
    for one in events:
        log.read(json.dumps(one).encode())
    return log


def steps(first: int, last: int, since: float, every: int = 10, seconds: float = 20.0) -> list[dict[str, Any]]:
    """Logged steps, `seconds` apart."""
    which = range(first, last + 1, every)
    return [event("step", s, since + (n + 1) * seconds, loss=1 / s, lr=1e-3) for n, s in enumerate(which)]


# numbers as text


@given(st.lists(numbers, max_size=80), st.integers(1, 40), st.integers(1, 4), st.sampled_from([BLOCKS, ASCII_BLOCKS]))
@settings(max_examples=150, deadline=None)
def test_a_chart_is_as_wide_as_its_values_at_most(values: list[float], width: int, rows: int, blocks: str) -> None:
    lines = chart(values, width, rows, blocks)
    assert len(lines) == rows
    assert {len(line) for line in lines} == {min(width, len(values))}
    assert set("".join(lines)) <= {*blocks, " ", NOT_FINITE}
    assert " " not in lines[-1].replace(blocks[0], "")  # the lowest row says something of every value


@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=30), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_higher_values_stand_higher(values: list[float], rows: int) -> None:
    lines = chart(values, len(values), rows)
    heights = [sum(BLOCKS.index(line[i]) + 1 for line in lines if line[i] != " ") for i in range(len(values))]
    by_value = [height for _, height in sorted(zip(values, heights, strict=True))]
    assert by_value == sorted(by_value)
    if max(values) / 2 - min(values) / 2 > 0:
        assert (by_value[0], by_value[-1]) == (1, 8 * rows)


def test_charts_by_eye() -> None:
    assert chart([0, 1, 2, 3, 4, 5, 6, 7], 8) == ["▁▂▃▄▅▆▇█"]
    assert chart([0, 0, 7, 7], 2) == ["▁█"]
    assert chart([3.0], 60) == ["▄"]
    assert chart([1.0, math.nan, 2.0], 3) == ["▁x█"]
    assert chart([1.0, math.nan, 2.0, 2.0], 2) == ["▁█"]
    assert chart([math.nan], 5) == [NOT_FINITE]
    assert chart([], 5) == [""]
    assert chart([0, 1], 2, rows=2) == [" █", "▁█"]


def test_words() -> None:
    seconds = [-3, 0, 89, 90, 3599, 3600, 86_399, 90_000]
    assert [duration(s) for s in seconds] == [
        "0 s", "0 s", "89 s", "2 min", "1 h 0 min", "1 h 0 min", "1 d 0 h", "1 d 1 h",
    ]  # fmt: skip
    assert [amount(v) for v in (0, 12, 0.000123, 12345.6, math.nan)] == ["0", "12", "0.000123", "12,346", "-"]
    assert [size(v) for v in (math.nan, 0, 5 * 2**20, 3 * 2**30)] == ["-", "-", "5 MiB", "3.0 GiB"]
    assert wrap_items(["aaaa", "bbbb", "cccc"], 11) == ["aaaa   bbbb", "cccc"]
    assert sanitize("a\n\x1b[31mb\x07") == "a ?[31mb?"


# the event file


@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\r", b"\n")), max_size=12))
@settings(max_examples=150, deadline=None)
def test_reading_as_it_grows_equals_reading_the_whole_file(tmp_path_factory: Any, parts: list[bytes]) -> None:
    file = tmp_path_factory.mktemp("tail") / "events.jsonl"
    file.touch()
    tail, found = Tail(file), []
    for part in parts:
        with file.open("ab") as stream:
            stream.write(part)
        assert not tail.truncated()
        found += list(tail.lines())
    whole = b"".join(parts)
    assert found == [line + b"\n" for line in whole.split(b"\n")[:-1]]
    assert list(tail.lines()) == []


def test_later_looks_read_only_what_is_new(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"old line\n" * 10_000)
    tail = Tail(file)
    assert sum(1 for _ in tail.lines()) == 10_000
    with file.open("r+b") as stream:
        stream.write(b"changed!\n" * 10_000)  # nobody looks there any more
        stream.write(b"new\n")
    assert list(tail.lines()) == [b"new\n"]


def test_a_file_begun_anew_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"one\ntwo\n")
    tail = Tail(file)
    assert list(tail.lines()) == [b"one\n", b"two\n"]
    file.write_bytes(b"new\n")
    assert tail.truncated()
    assert list(tail.lines()) == [b"new\n"]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=25))
@settings(max_examples=150, deadline=None)
def test_steps_done_again_replace_the_earlier_ones(moves: list[tuple[bool, int]]) -> None:
    """Against a plain model: a resume goes back to a step, and what came after it is not so any more."""
    log, expected, step = Log(), dict[int, float](), 0
    for when, (back, amount_) in enumerate(moves):
        if back:
            step = max(0, step - amount_)
            log.add(event("resumed", step, when))
            expected = {s: loss for s, loss in expected.items() if s <= step}
        else:
            step += amount_
            log.add(event("step", step, when, loss=float(when)))
            expected[step] = float(when)
    assert dict(zip(log.steps, log.losses, strict=True)) == expected
    assert list(log.steps) == sorted(expected)
    assert log.step == step
    assert log.best == (min((loss, s) for s, loss in expected.items()) if expected else None)


def test_what_a_killed_run_left_of_a_line_is_counted_and_left_out() -> None:
    log = log_of(event("start", 0, NOW, total_steps=90, world_size=4), *steps(10, 30, NOW))
    for line in (b'{"event": "step", "ti\n', b"[1]\n", b"7\n", b'{"event": "step"}\n', b"\xff\x00\n", b"\n"):
        log.read(line)
    log.add(event("resumed", 20, NOW + 500))
    log.add(event("step", 30, NOW + 520, loss=None))
    assert log.unreadable == 5
    assert list(log.steps) == [10, 20, 30]
    assert math.isnan(log.losses[-1])
    assert (log.total_steps, log.world_size, log.resumes, log.best) == (90, 4, 1, (1 / 20, 20))


def test_rates_and_skipped_steps() -> None:
    log = log_of(event("start", 0, NOW), *steps(10, 30, NOW, seconds=30.0))
    assert log.seconds_per_step == 3.0
    log.add(event("step", 40, NOW + 120, images_per_second=100.0, skipped_steps=2))
    log.add(event("step", 50, NOW + 150, images_per_second=300.0, skipped_steps=2))
    assert log.mean_rate == pytest.approx(150.0)
    log.add(event("skipped", 53, NOW + 160))
    assert log.skipped == 3


# the state of a run


def view(log: Log, now: float, *ranks: Rank) -> View:
    return View("run", "", log, now, ranks)


def rank_of(number: int = 0, **changes: Any) -> Rank:
    return replace(Rank(number, "a", 100, 0.5, 300.0, 0.02, 2**30, 2**31, 0, ""), **changes)


def test_states() -> None:
    running = [event("start", 0, NOW, total_steps=100), *steps(10, 50, NOW)]
    log = log_of(*running)  # the last event at NOW + 100, the usual distance is 20 s
    assert view(Log(), NOW).state is State.NOT_STARTED
    assert view(log, NOW + 199).state is State.RUNNING
    assert view(log, NOW + 201).state is State.STALLED
    assert view(log, NOW + 201).silence == 101
    assert view(log, NOW + 201, rank_of(age=3.0)).state is State.RUNNING
    assert view(log, NOW + 201, rank_of(age=150.0)).state is State.STALLED
    assert view(log_of(*running, event("end", 100, NOW + 300)), NOW + 9999).state is State.FINISHED
    assert view(log_of(*running, event("end", 100, NOW + 300)), NOW + 9999).elapsed == 300
    assert view(log_of(*running, event("failed", 50, NOW + 101)), NOW + 9999).state is State.FAILED
    stopped = log_of(*running, event("preempted", 50, NOW + 101, reason="SIGTERM on rank 0"))
    assert view(stopped, NOW + 9999).state is State.PREEMPTED
    assert math.isnan(view(stopped, NOW + 102).remaining)
    again = log_of(*running, event("end", 50, NOW + 101), event("resumed", 50, NOW + 200))
    assert view(again, NOW + 210).state is State.RUNNING


@pytest.mark.parametrize("end", ["preempted", "failed"])
def test_a_new_attempt_is_running_until_it_is_refused(end: str) -> None:
    log = log_of(event("start", 0, NOW), *steps(10, 50, NOW), event(end, 50, NOW + 101))
    log.add({"event": "attempt", "time": NOW + 200, "message": "starting again"})
    assert view(log, NOW + 201).state is State.RUNNING
    log.add({"event": "refused", "time": NOW + 202, "message": "another recipe"})
    assert view(log, NOW + 203).state == end
    log.add({"event": "attempt", "time": NOW + 210, "message": "starting again"})
    log.add(event("resumed", 50, NOW + 220))
    assert view(log, NOW + 221).state is State.RUNNING
    log.add(event("superseded", 50, NOW + 222))  # an earlier start, from which this one took the run over
    assert view(log, NOW + 223).state is State.RUNNING


def test_quick_runs_are_patient_for_a_minute_and_fresh_ones_for_their_first_steps() -> None:
    quick = log_of(*steps(1, 30, NOW, every=1, seconds=0.5))
    assert view(quick, NOW + 15 + 59).state is State.RUNNING
    assert view(quick, NOW + 15 + 61).state is State.STALLED
    fresh = log_of(event("start", 0, NOW))
    assert view(fresh, NOW + 599).state is State.RUNNING
    assert view(fresh, NOW + 601).state is State.STALLED


def test_time_left() -> None:
    log = log_of(event("start", 0, NOW, total_steps=100), *steps(10, 50, NOW))
    now = NOW + 101
    assert view(log, now).remaining == 100.0
    assert view(log, now, rank_of(step=60)).remaining == 80.0
    assert replace(view(log, now), end=now + 77).remaining == 77.0
    assert math.isnan(view(log_of(*steps(10, 50, NOW)), now).remaining)  # no target
    assert math.isnan(view(log, now + 9999).remaining)


# endpoints


class Exporter:
    """Every metric of the list, as an exporter would show it, for two ranks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics: dict[str, Any] = {}
        kinds: dict[Kind, Any] = {Kind.COUNTER: Counter, Kind.GAUGE: Gauge}
        for metric in METRICS:
            arguments = metric.full_name.removesuffix("_total"), metric.help, metric.label_names
            if metric.kind is Kind.HISTOGRAM:
                made: Any = Histogram(*arguments, registry=self.registry, buckets=STEP_BUCKETS)
            else:
                made = kinds[metric.kind](*arguments, registry=self.registry)
            if metric.states:
                for rank, present in (("0", "data_wait"), ("1", "backward")):
                    for state in metric.states:
                        made.labels(rank, state).set(state == present)
            self.metrics[metric.name] = made
        self.begin()

    def begin(self) -> None:
        single = {"target_steps": 1000, "epoch": 1.5, "start_timestamp_seconds": NOW - 100, "loss": 0.5,
                  "estimated_end_timestamp_seconds": NOW + 900, "images_per_second": 64.0, "gradient_norm": 0.25,
                  "learning_rate": 1e-3, "checkpoint_timestamp_seconds": NOW - 40}  # fmt: skip
        for name, value in single.items():
            self.metrics[name].set(value)
        self.metrics["run_info"].labels("0f", "nano", "1M", "4", "1", "bf16", "2", "0", "0").set(1)
        for rank, wait in (("0", 0.1), ("1", 0.4)):
            self.metrics["replaced_samples_total"].labels(rank, "decode").inc(2)
            self.metrics["replaced_samples_total"].labels(rank, "truncated").inc(1)
            self.metrics["resident_memory_bytes"].labels(rank).set(2**30)
            self.train(rank, steps=10, wait=wait, beat=NOW - 1)

    def train(self, rank: str, steps: int, wait: float, beat: float) -> None:
        """Steps of 1 second and 32 images each."""
        for _ in range(steps):
            self.metrics["step_seconds"].labels(rank).observe(1.0)
            self.metrics["step_part_seconds"].labels(rank, "data_wait").observe(wait)
            self.metrics["step_part_seconds"].labels(rank, "forward").observe(1 - wait)
        self.metrics["images_total"].labels(rank).inc(32 * steps)
        self.metrics["step"].labels(rank).inc(steps)
        self.metrics["heartbeat_timestamp_seconds"].labels(rank).set(beat)


@pytest.fixture
def exporter() -> Iterator[tuple[Exporter, str]]:
    made = Exporter()
    server, thread = start_http_server(0, "127.0.0.1", made.registry)
    yield made, f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_one_scrape_tells_means_and_two_tell_the_present(exporter: tuple[Exporter, str]) -> None:
    run, address = exporter
    endpoint = Endpoint(f"http://{address}/metrics", "a", Access())
    endpoint.poll(NOW)
    first = {rank.rank: rank for rank in endpoint.ranks(NOW)}
    assert (first[1].images_per_second, round(first[1].data_wait, 3), first[1].replaced) == (32.0, 0.4, 3)
    assert (first[0].step, first[0].age, first[0].memory, first[0].memory_limit) == (10, 1.0, 2**30, 0)
    run.train("0", steps=20, wait=0.05, beat=NOW + 9)
    endpoint.poll(NOW + 10)
    second = {rank.rank: rank for rank in endpoint.ranks(NOW + 10)}
    assert (second[0].images_per_second, round(second[0].data_wait, 3)) == (64.0, 0.05)
    assert [rank.rank for rank in sorted(second.values(), key=lambda rank: rank.sort_key)] == [1, 0]


def test_late_and_silent_ranks(exporter: tuple[Exporter, str]) -> None:
    run, address = exporter
    endpoint = Endpoint(f"http://{address}/metrics", "a", Access())
    run.train("1", steps=1, wait=0.0, beat=NOW + 99)
    endpoint.poll(NOW + 100)
    found = [(rank.rank, rank.trouble, rank.phase) for rank in endpoint.ranks(NOW + 102)]
    assert found == [(0, "late", "data_wait"), (1, "", "backward")]
    run.metrics["alive_timestamp_seconds"].labels("0").set(NOW + 60)
    endpoint.poll(NOW + 102)
    assert [rank.trouble for rank in endpoint.ranks(NOW + 102)] == ["stopped", ""]
    run.metrics["alive_timestamp_seconds"].labels("0").set(NOW + 101)
    endpoint.poll(NOW + 102)
    assert endpoint.ranks(NOW + 102)[0].images_per_second == 0
    endpoint.url = "http://127.0.0.1:1/metrics"
    endpoint.poll(NOW + 103)
    assert endpoint.problem == "Connection refused"
    assert [(rank.trouble, rank.age) for rank in endpoint.ranks(NOW + 110)] == [("silent", 111.0), ("silent", 11.0)]


def test_a_restarted_process_begins_its_rates_anew() -> None:
    def answer(images: float) -> str:
        return (
            f'mixmae_images_total{{rank="0"}} {images}\nmixmae_heartbeat_timestamp_seconds{{rank="0"}} {NOW + images}\n'
        )

    endpoint = Endpoint("http://a:1", "a", Access())
    for at, images in enumerate((10, 20, 5)):
        endpoint._access = type("Told", (), {"fetch": lambda _, url, images=images: answer(images).encode()})()
        endpoint.poll(NOW + at)
    assert len(endpoint.scrapes) == 1
    assert all(rank.images_per_second >= 0 or math.isnan(rank.images_per_second) for rank in endpoint.ranks(NOW + 2))


def test_plain_pages_cost_no_certificates(exporter: tuple[Exporter, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the system's takes longer than a page, and in several threads at once Python 3.12 crashes."""
    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", lambda *_: pytest.fail("certificates are read"))
    assert b"mixmae" in Access().fetch(f"http://{exporter[1]}/metrics")


def test_every_metric_is_parsed(exporter: tuple[Exporter, str]) -> None:
    scrape = parse_scrape(Access().fetch(f"http://{exporter[1]}/metrics").decode(), NOW)
    assert scrape.world_size == 4
    assert {event["event"] for event in events_of(scrape)} == {"start", "step", "checkpoint"}
    assert scrape.main["loss"] == 0.5
    assert scrape.ranks.keys() == {0, 1}


@pytest.mark.parametrize("text", ["", "<html>", "go_threads 4\n", "mixmae_step{rank=\n"])
def test_other_answers_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the parser's own words)
        parse_scrape(text, NOW)


def test_the_worst_rank_comes_first() -> None:
    ranks = [
        rank_of(0),
        rank_of(1, age=50.0, trouble="late", step=100),
        rank_of(2, data_wait=0.5),
        rank_of(3, age=60.0, trouble="late", step=99),
        rank_of(4, replaced=9),
        rank_of(5, data_wait=math.nan),
    ]
    assert [rank.rank for rank in sorted(ranks, key=lambda rank: rank.sort_key)] == [3, 1, 2, 4, 0, 5]


def test_a_loopback_address_of_another_host_is_not_asked() -> None:
    assert reachable("node7:9400", "node7")
    assert not reachable("127.0.0.1:9400", "a-node-that-is-not-this-one")
    assert not reachable("[::1]:9400", "a-node-that-is-not-this-one")


# alerts


def test_alerts_of_this_run_that_fire() -> None:
    def alert(name: str, state: str, run: str, minute: int) -> dict[str, Any]:
        labels = {"alertname": name, "run": run, "severity": "critical"}
        when = f"2024-05-01T10:{minute:02d}:00.123456789Z"
        return {"labels": labels, "state": state, "activeAt": when, "annotations": {"summary": "so"}}

    alerts = [alert("Old", "firing", "a", 1), alert("New", "firing", "a", 2), alert("Else", "firing", "b", 3)]
    text = json.dumps({"status": "success", "data": {"alerts": [*alerts, alert("Soon", "pending", "a", 4)]}})
    found = parse_alerts(text, {"run": "a"})
    assert [(one.name, one.severity, one.text) for one in found] == [
        ("New", "critical", "so"),
        ("Old", "critical", "so"),
    ]
    for other in ("[]", "[" * 100_000, "{}", '{"data": {"alerts": [{"state": "firing"}]}}', "<html>"):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_alerts(other, {})


# a run directory, and an endpoint, as a whole


def write_events(run_dir: Path, *events: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "events.jsonl").open("a") as stream:
        stream.writelines(json.dumps(one) + "\n" for one in events)


def test_a_run_directory_with_an_exporter(
    tmp_path: Path, exporter: tuple[Exporter, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixmae.monitoring.watch.scrape.socket.gethostname", lambda: "here")
    write_events(tmp_path, event("start", 0, NOW - 100, total_steps=1000, world_size=4))
    (tmp_path / "recipe.yaml").write_text(task_of(tiny_recipe()).recipe.to_yaml())
    write_target(tmp_path, "here", exporter[1])
    write_target(tmp_path, "there", "127.0.0.1:9")
    run = WatchedRun(tmp_path, interval=0.05)
    run.wait_until_polled()
    seen = run.view(NOW)
    assert (seen.name, seen.details) == (tmp_path.name, "mixmae_swin_nano, 4 ranks, 8 images a step")
    assert [rank.rank for rank in seen.ranks] == [1, 0]
    assert seen.step == 10
    assert [note.split(":")[0] for note in seen.notes] == ["ranks of there are not shown"]
    write_events(tmp_path, event("end", 1000, NOW + 1))
    for file in (tmp_path / "monitoring" / "targets").iterdir():
        file.unlink()
    ended = run.view(NOW + 2)
    assert (ended.state, list(ended.ranks), list(ended.notes)) == (State.FINISHED, [], [])


def test_exporters_that_do_not_answer_are_told_in_a_line(tmp_path: Path) -> None:
    write_events(tmp_path, event("start", 0, NOW))
    assert "no exporter is announced" in WatchedRun(tmp_path, 1.0).view(NOW).notes[0]
    for node in "abcde":
        write_target(tmp_path, node, "localhost.localdomain:1" if node == "a" else "0.0.0.0:1")
    run = WatchedRun(tmp_path, 1.0)
    run.wait_until_polled()
    (note,) = run.view(NOW).notes
    assert note.startswith("5 of 5 exporters do not respond: a, b, c and 2 more (")


def test_an_endpoint_that_hangs_does_not_hold_up_the_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmae.monitoring.watch.scrape.socket.gethostname", lambda: "a")
    release = threading.Event()

    class Hanging(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            release.wait(60)

    server = HTTPServer(("127.0.0.1", 0), Hanging)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    write_events(tmp_path, event("start", 0, NOW))
    write_target(tmp_path, "a", f"127.0.0.1:{server.server_port}")
    run = WatchedRun(tmp_path, 1.0)
    assert run.view(NOW).ranks == []
    run.wait_until_polled()
    assert not release.is_set()  # it hangs still
    release.set()
    server.shutdown()
    server.server_close()
    assert "no response within 1.5 s" in run.view(NOW).notes[0]


def test_an_endpoint_alone(exporter: tuple[Exporter, str]) -> None:
    run, address = exporter
    with pytest.raises(WatchError, match=r"HTTP 404|no mixmae_"):
        WatchedEndpoint(f"http://{address}/nothing?name[]=go", 1.0)
    watched = WatchedEndpoint(f"http://{address}", interval=0.02)
    seen = watched.view(NOW)
    assert (seen.name, seen.details, seen.step, seen.remaining) == (address, "2 of 4 ranks", 10, 900.0)
    assert (seen.log.total_steps, list(seen.log.losses), seen.log.last["lr"]) == (1000, [0.5], 1e-3)
    assert seen.log.checkpoint is not None
    run.metrics["loss"].set(0.25)
    run.train("0", steps=1, wait=0.0, beat=NOW)
    until = time.monotonic() + 60
    while len(watched.view(NOW).log.losses) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert list(watched.view(NOW).log.losses)[-1] == 0.25
    assert len(watched.view(NOW).log.news) == 2  # neither start nor checkpoint is told twice


def test_a_node_without_the_main_rank() -> None:
    scrape = Scrape(NOW, {8: {"step": 3.0}}, {"scrapes_total": 1.0}, None)
    assert list(events_of(scrape)) == []


@pytest.mark.parametrize(("auth", "problem"), [("user:word", None), ("user:other", "HTTP 401 Unauthorized")])
def test_tls_and_passwords_of_the_recipe(tmp_path: Path, auth: str, problem: str | None) -> None:
    cert, key = certify(tmp_path, ELSEWHERE)
    (tmp_path / "auth").write_text(auth + "\n")

    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.headers["Authorization"] == "Basic dXNlcjp3b3Jk" else 401)
            self.end_headers()
            self.wfile.write(b'mixmae_step{rank="0"} 3\n')

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server = HTTPServer(("127.0.0.1", 0), Guarded)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = Endpoint(f"https://127.0.0.1:{server.server_port}/metrics", "a", Access(cert, tmp_path / "auth"))
    endpoint.poll(NOW)
    stranger = Endpoint(endpoint.url, "a", Access(auth_file=tmp_path / "auth"))
    stranger.poll(NOW)
    server.shutdown()
    server.server_close()
    assert endpoint.problem == problem
    assert len(endpoint.ranks(NOW)) == (problem is None)
    assert stranger.problem is not None


@contextmanager
def recording_exporter(redirect: str | None = None) -> Iterator[tuple[str, list[str | None]]]:
    """An exporter's address, and the Authorization headers that it got."""
    got: list[str | None] = []

    class Recording(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(self.headers["Authorization"])
            self.send_response(200 if redirect is None else 302)
            if redirect is not None:
                self.send_header("Location", redirect)
            self.end_headers()
            self.wfile.write(b'mixmae_step{rank="0"} 3\n')

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Recording)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


def test_nothing_of_the_readers_goes_where_a_run_directory_says(tmp_path: Path) -> None:
    """Neither the file that its recipe names, nor the reader's own password, however the address is told."""
    (tmp_path / "private").write_text("me:word")
    cert, _ = certify(tmp_path, ELSEWHERE)
    settings = {"auth_file": str(tmp_path / "private")}
    for number, monitoring in enumerate([settings, settings | {"certfile": str(cert)}, [], "x"]):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        (run_dir / "recipe.yaml").write_text(json.dumps({"encoder": {}, "train": {}, "monitoring": monitoring}))
        for access in (PLAIN, Access(cert, tmp_path / "private"), Access(None, tmp_path / "private")):
            with recording_exporter() as (address, got):
                write_target(run_dir, socket.gethostname(), address)
                run = WatchedRun(run_dir, 60.0, access=access)
                run.wait_until_polled()
                assert run.view(NOW).step == 3
            assert got == [None]


def test_a_password_does_not_follow_a_redirection(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("me:word")
    with (
        recording_exporter() as (elsewhere, got),
        recording_exporter(f"http://{elsewhere}/metrics") as (address, first),
    ):
        endpoint = Endpoint(f"http://{address}/metrics", "a", Access(auth_file=tmp_path / "auth"))
        endpoint.poll(NOW)
    assert (first, got, endpoint.problem) == (["Basic bWU6d29yZA=="], [], "HTTP 302 Found")


def test_exporters_with_tls_need_the_readers_certificate(tmp_path: Path) -> None:
    write_events(tmp_path, event("start", 0, NOW))
    write_target(tmp_path, socket.gethostname(), "127.0.0.1:1", "https")
    run = WatchedRun(tmp_path, 60.0)
    run.wait_until_polled()
    (note,) = run.view(NOW).notes
    assert "it speaks TLS: give its certificate with --certfile" in note


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("step", "loss", "lr", "grad_norm", "epoch", "images_per_second", "skipped_steps", "replaced_samples",
          "retried_reads", "peak_memory_bytes", "total_steps", "world_size", "message", "time", "event")  # fmt: skip


@given(
    events=st.lists(
        st.builds(
            lambda kind, fields: {"event": kind, "time": NOW} | fields,
            st.sampled_from(["start", "resumed", "step", "checkpoint", "skipped", "failed", "other"]),
            st.dictionaries(st.sampled_from(FIELDS), anything, max_size=6),
        ),
        max_size=6,
    ),
    recipe=st.dictionaries(
        st.sampled_from(["encoder", "train"]), st.dictionaries(st.just("name"), anything), max_size=2
    ),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_run_directory_holds_is_shown(events: list[dict[str, Any]], recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    (tmp_path / "recipe.yaml").write_text(json.dumps({"encoder": {}, "train": {}} | recipe))
    with StringIO() as shown:
        Console(file=shown, width=80).print(frame(WatchedRun(tmp_path, 60.0).view(NOW), 80))
        assert "\x1b" not in shown.getvalue()


NAMES = ["mixmae_step", "mixmae_rank_part", "mixmae_target_steps", "mixmae_loss", "mixmae_run_info",
         "mixmae_images_total", "mixmae_heartbeat_timestamp_seconds", "mixmae_step_seconds_sum",
         "mixmae_replaced_samples_total"]  # fmt: skip


@given(st.lists(st.builds("{}{} {}".format, st.sampled_from(NAMES), st.sampled_from(
    ["", '{rank="0"}', '{rank="x"}', '{rank="0",part="forward"}', '{rank="0",part="x"}', '{world_size="x"}', "{", "}"]),
    st.sampled_from(["1", "NaN", "+Inf", "-Inf", "-1", "1e308", "x", ""])), max_size=8))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_whatever_an_exporter_answers_is_shown_or_named(lines: list[str]) -> None:
    try:
        scrape = parse_scrape("\n".join(lines), NOW)
    except ValueError:
        return
    endpoint = Endpoint("http://a:1", "a", PLAIN)
    endpoint.scrapes = (scrape,)
    log = Log()
    for one in events_of(scrape):
        log.add(one)
    with StringIO() as shown:
        Console(file=shown, width=80).print(frame(View("a", "", log, NOW, endpoint.ranks(NOW)), 80))


def test_a_run_written_while_it_is_watched(tmp_path: Path) -> None:
    """A thread writes lines in two halves; no look sees half a line, and in the end all are there."""
    write_events(tmp_path, event("start", 0, NOW, total_steps=300))

    def write() -> None:
        with (tmp_path / "events.jsonl").open("ab", buffering=0) as stream:
            for one in steps(1, 300, NOW, every=1):
                line = json.dumps(one).encode() + b"\n"
                stream.write(line[:20])
                time.sleep(0.0005)
                stream.write(line[20:])

    run = WatchedRun(tmp_path, 1.0)
    writer = threading.Thread(target=write)
    writer.start()
    looks = []
    while writer.is_alive():
        looks.append(run.view(NOW).log.step)
    writer.join()
    log = run.view(NOW).log
    assert looks == sorted(looks)
    assert list(log.steps) == list(range(1, 301))
    assert log.unreadable == 0


def test_directories_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(WatchError, match=r"neither recipe\.yaml nor events\.jsonl"):
        WatchedRun(tmp_path, 1.0)
    (tmp_path / "recipe.yaml").write_text("encoder: {na")  # damaged
    assert WatchedRun(tmp_path, 1.0).view(NOW).state is State.NOT_STARTED
    targets = tmp_path / "monitoring" / "targets"
    targets.mkdir(parents=True)
    (targets / "a.json").write_text("{")
    (note, _) = WatchedRun(tmp_path, 1.0).view(NOW).notes
    assert note.startswith(f"{targets / 'a.json'} is no Prometheus target file")
