"""The real Prometheus and Alertmanager over real runs, in quick motion, and what they tell people."""

import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from mixmae.base.ports import free_port
from mixmae.monitoring.prometheus.configuration import HERE
from mixmae.monitoring.prometheus.local import Monitor, Programs, find_programs
from tests.monitoring.prometheus.test_local import ask
from tests.monitoring.services import needs

FACTOR = 60
"""An hour is a minute."""
SHORTEST = 5
"""Seconds: a rank's sign of life is a second old when it is told, and two more when a rule looks at it."""


def quick(rules: Path, folder: Path) -> Path:
    """A copy of a rule file in which durations are divided by FACTOR."""
    content = yaml.safe_load(rules.read_text())
    spans = re.compile(r"(?<![\w.])(\d+)(s|m|h)\b")
    for group in content["groups"]:
        for rule in group["rules"]:
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
    return str(max(SHORTEST, int(match[1]) // FACTOR)) if int(match[1]) >= 60 else match[1]


class Messages(ThreadingHTTPServer):
    """Receives what Alertmanager sends to people."""

    def __init__(self) -> None:
        self.received: list[tuple[str, str, str]] = []
        """Alert, `firing` or `resolved`, and the summary."""
        messages = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                messages.extend(
                    (alert["labels"]["alertname"], alert["status"], alert["annotations"]["summary"])
                    for alert in content["alerts"]
                )
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def last(self, alert: str) -> tuple[str, str]:
        """What was told of an alert last, and the summary; empty if nothing was."""
        return next(((status, text) for name, status, text in reversed(self.received) if name == alert), ("", ""))


class QuickMonitor(Monitor):
    """The shipped configuration with quick rules, and messages to a server of the test's."""

    def __init__(self, programs: Programs, folders: Sequence[Path], data: Path, messages: Messages) -> None:
        super().__init__(programs, folders, data, free_port(), free_port(), "1s")
        data.mkdir()
        self._rules = {name: quick(HERE / name, data) for name in ("rules.yml", "alerts.yml")}
        content = yaml.safe_load((HERE / "alertmanager.yml").read_text())
        content["route"] |= {"group_wait": "1s", "group_interval": "5s"}
        (people,) = content["receivers"]
        people["webhook_configs"] = [{"url": f"http://127.0.0.1:{messages.server_port}/"}]
        (data / "alertmanager.yml").write_text(yaml.safe_dump(content))

    @property
    def configuration(self) -> str:
        content = yaml.safe_load(super().configuration)
        content["rule_files"] = [str(self._rules[Path(file).name]) for file in content["rule_files"]]
        return yaml.safe_dump(content)

    @property
    def commands(self) -> dict[str, list[str]]:
        commands = super().commands
        shipped, quick = str(HERE / "alertmanager.yml"), str(self.data / "alertmanager.yml")
        commands["alertmanager"] = [part.replace(shipped, quick) for part in commands["alertmanager"]]
        return commands


class Watching:
    """Asks both servers."""

    def __init__(self, monitor: Monitor, messages: Messages, alive: Callable[[], bool]) -> None:
        self.monitor, self.messages, self._alive = monitor, messages, alive

    def alerts(self) -> dict[str, str]:
        """Alerts that fire as Alertmanager has them, by name: `active`, or `suppressed` by another one."""
        found = ask(f"{self.monitor.alertmanager_url}/api/v2/alerts")
        return {alert["labels"]["alertname"]: alert["status"]["state"] for alert in found}

    def query(self, expression: str, **parameters: float) -> list[dict[str, Any]]:
        path = "query_range" if parameters else "query"
        given = urllib.parse.urlencode({"query": expression, **parameters})
        found: list[dict[str, Any]] = ask(f"{self.monitor.url}/api/v1/{path}?{given}")["data"]["result"]
        return found

    def value(self, expression: str) -> float:
        """The first sample's; 0 if there is none."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else 0.0

    def until(self, holds: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, (self.alerts(), self.messages.received[-5:])
            assert self._alive(), "a rank ended"
            time.sleep(0.5)

    def fire(self, *alerts: str) -> None:
        """Waits until alerts fire, and people know of those that no other one explains."""
        self.until(lambda: set(alerts) <= set(self.alerts()))
        self.until(lambda: not [name for name in alerts if self.alerts()[name] == "active" and not self.told(name)])

    def resolve(self, *alerts: str) -> None:
        """Waits until none of these alerts fires, and people who were told of them know that."""
        self.until(lambda: not set(alerts) & set(self.alerts()))
        self.until(lambda: not any(map(self.told, alerts)))

    def told(self, alert: str) -> bool:
        """Whether people think that it fires."""
        return self.messages.last(alert)[0] == "firing"

    def summary(self, alert: str) -> str:
        return self.messages.last(alert)[1]


@contextmanager
def _updated(monitor: Monitor) -> Iterator[None]:
    """Has the monitor follow its runs, as `mixmae monitor up` does."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(0.5):
            monitor.update()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def watching(folders: Sequence[Path], data: Path, alive: Callable[[], bool]) -> Iterator[Watching]:
    """Prometheus and Alertmanager over run directories.

    Args:
        data: a folder to be made.
        alive: whether there is any use in waiting.
    """
    needs("prometheus", "prometheus")
    needs("prometheus-alertmanager", "prometheus-alertmanager")
    messages = Messages()
    try:
        with QuickMonitor(find_programs(), folders, data, messages) as monitor, _updated(monitor):
            yield Watching(monitor, messages, alive)
    finally:
        messages.shutdown()
        messages.server_close()
