"""Prometheus and Alertmanager on this machine, with the shipped configuration, for some run directories."""

import shutil
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from mixmae.base.files import atomic_write
from mixmae.monitoring.exporter.access import PLAIN, Access
from mixmae.monitoring.prometheus.configuration import (
    HERE,
    HOST,
    INTERVAL,
    PASSWORD,
    Runs,
    configuration,
    find_runs,
    target_groups,
    targets_file,
)

DOWNLOADS = "https://prometheus.io/download/"
_STARTING, _ENDING = 30.0, 10.0
"""Seconds that a server has to answer, and to end by itself."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without the proxy that the environment may name: it does not reach this machine's loopback interface."""


class MonitorError(RuntimeError):
    """What keeps the servers from running here."""


@dataclass(frozen=True)
class Programs:
    """Paths of the servers."""

    prometheus: str
    alertmanager: str | None
    """None if there is none: alerts are then seen in Prometheus alone."""


def find_programs() -> Programs:
    """The servers on PATH; Debian calls the second prometheus-alertmanager.

    Raises:
        MonitorError: Prometheus is missing; says how to get it.
    """
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        raise MonitorError(
            "the program prometheus is not on PATH; get it with 'apt-get install prometheus prometheus-alertmanager' "
            f"or from {DOWNLOADS}"
        )
    return Programs(prometheus, shutil.which("alertmanager") or shutil.which("prometheus-alertmanager"))


class Monitor:
    """The servers as children of this process, from `with` to its end. Their output goes to files in `data`.

    Attributes:
        runs: those that announced exporters at the last update.
        notes: why some are not watched.
    """

    def __init__(
        self,
        programs: Programs,
        folders: Sequence[Path],
        data: Path,
        port: int,
        alertmanager_port: int,
        interval: str = INTERVAL,
        access: Access = PLAIN,
    ) -> None:
        self.folders, self.data, self.port = folders, data.resolve(), port
        self.alertmanager_port = None if programs.alertmanager is None else alertmanager_port
        self._programs, self._interval, self._access = programs, interval, access
        self.runs: Runs = {}
        self.notes: list[str] = []
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._written: dict[Path, str] = {}

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def alertmanager_url(self) -> str | None:
        return None if self.alertmanager_port is None else f"http://{HOST}:{self.alertmanager_port}"

    @property
    def configuration(self) -> str:
        """Of Prometheus."""
        return configuration(self.data, self._access, self.alertmanager_port, self._interval)

    @property
    def commands(self) -> dict[str, list[str]]:
        """Argument lists, by the server's name."""
        commands = {
            "prometheus": [
                self._programs.prometheus,
                f"--config.file={self.data / 'prometheus.yml'}",
                f"--storage.tsdb.path={self.data / 'prometheus'}",
                f"--web.listen-address={HOST}:{self.port}",
                f"--web.external-url={self.url}/",
                f"--web.console.templates={HERE / 'consoles'}",
                f"--web.console.libraries={HERE / 'consoles'}",
            ]
        }
        if self._programs.alertmanager is not None:
            commands["alertmanager"] = [
                self._programs.alertmanager,
                f"--config.file={HERE / 'alertmanager.yml'}",
                f"--storage.path={self.data / 'alertmanager'}",
                f"--web.listen-address={HOST}:{self.alertmanager_port}",
                f"--web.external-url={self.alertmanager_url}/",
                "--cluster.listen-address=",  # no others to find
            ]
        return commands

    def __enter__(self) -> Self:
        """Starts the servers and waits until they answer.

        Raises:
            MonitorError: one ended at once or did not answer in time, or there is no place for its data.
        """
        try:
            self.data.mkdir(parents=True, exist_ok=True)
            self.update()
            (self.data / "prometheus.yml").write_text(self.configuration)
            if (credentials := self._access.credentials) is not None:
                (self.data / PASSWORD).unlink(missing_ok=True)
                (self.data / PASSWORD).touch(mode=0o600)
                (self.data / PASSWORD).write_text(credentials[1])
        except OSError as error:
            raise MonitorError(f"{self.data} cannot be written to: {error.strerror}; name another folder") from error
        try:
            for name, command in self.commands.items():
                with self._log(name).open("wb") as log:
                    # A session of its own: Ctrl-C is for this process, which ends the servers in its own time.
                    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
                self._children[name] = child
            for url in filter(None, (self.url, self.alertmanager_url)):
                self._wait_for(f"{url}/-/ready")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def update(self) -> None:
        """Tells Prometheus which exporters there are now; it notices the changed file by itself.

        Raises:
            OSError: there is no place for the file.
        """
        self.runs, self.notes = find_runs(self.folders, self._access)
        for scheme in ("http", "https"):
            file, groups = targets_file(self.data, scheme), target_groups(self.runs, scheme)
            if self._written.get(file) != groups:
                atomic_write(file, groups)
                self._written[file] = groups

    def check(self) -> None:
        """Raises MonitorError with the last words of a server that ended."""
        for name, child in self._children.items():
            if child.poll() is not None:
                words = self._log(name).read_text(errors="replace").splitlines()[-1:]
                raise MonitorError(f"{name} ended with {child.returncode} ({self._log(name)}): {''.join(words)}")

    def _log(self, name: str) -> Path:
        return self.data / f"{name}.log"

    def _wait_for(self, url: str) -> None:
        deadline = time.monotonic() + _STARTING
        while time.monotonic() < deadline:
            self.check()
            try:
                with _DIRECT.open(url, timeout=1):
                    return
            except OSError:  # not yet
                time.sleep(0.1)
        raise MonitorError(f"{url} does not answer after {_STARTING:g} s; the servers' output is in {self.data}")

    def _end(self) -> None:
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            try:
                child.wait(_ENDING)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
