"""Prometheus and Alertmanager on this machine, with the shipped configuration, for some run directories."""

import errno
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from monitoring.discovery import targets_folder

HERE = Path(__file__).parent
INTERVAL = "5s"
"""Between two scrapes: three times as often as shipped, since runs on one machine have few series and may be short."""
DOWNLOADS = "https://prometheus.io/download/"
PORTS = 100
"""Ports tried, from the wanted one on."""
_STARTING, _ENDING = 30.0, 10.0
"""Seconds that a server has to answer, and to end by itself."""
_HOST = "127.0.0.1"
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


def free_port_from(first: int, taken: Iterable[int] = ()) -> int:
    """The first port of the loopback interface from `first` on that nothing listens on, and that is not in `taken`.

    Raises:
        MonitorError: none of 100 ports is free.
    """
    last = min(first + PORTS, 2**16)
    for port in range(first, last):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do, after one that just ended
            try:
                probe.bind((_HOST, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                continue
        if port not in taken:
            return port
    raise MonitorError(f"none of the ports {first} to {last - 1} is free; name another one")


def run_dirs(folders: Iterable[Path]) -> list[Path]:
    """The folders themselves, which may be runs that have not begun, and the runs right below them."""
    found = []
    for folder in folders:
        below = {targets.parents[1] for targets in folder.glob("*/monitoring/targets")}
        found += [folder.resolve(), *sorted(path.resolve() for path in below)]
    return list(dict.fromkeys(found))


def target_files(folders: Iterable[Path]) -> list[Path]:
    """The target files that are there now."""
    return [file for folder in run_dirs(folders) for file in sorted(targets_folder(folder).glob("*.json"))]


def configuration(folders: Iterable[Path], alertmanager_port: int | None, interval: str = INTERVAL) -> str:
    """The shipped prometheus.yml for these folders, as YAML.

    Args:
        alertmanager_port: of the Alertmanager on this machine; None for none.
        interval: between scrapes and between evaluations of the rules, such as `5s`.
    """
    content = yaml.safe_load((HERE / "prometheus.yml").read_text())
    content["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    content["rule_files"] = [str(HERE / name) for name in content["rule_files"]]
    if alertmanager_port is None:
        del content["alerting"]
    else:
        content["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"{_HOST}:{alertmanager_port}"]
    files = [str(targets_folder(folder) / "*.json") for folder in run_dirs(folders)]
    content["scrape_configs"][0]["file_sd_configs"][0]["files"] = files
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text


class Monitor:
    """The servers as children of this process, from `with` to its end. Their output goes to files in `data`."""

    def __init__(
        self,
        programs: Programs,
        folders: Sequence[Path],
        data: Path,
        port: int,
        alertmanager_port: int,
        interval: str = INTERVAL,
    ) -> None:
        self.folders, self.data, self.port = folders, data.resolve(), port
        self.alertmanager_port = None if programs.alertmanager is None else alertmanager_port
        self._programs, self._interval = programs, interval
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._written = ""

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    @property
    def alertmanager_url(self) -> str | None:
        return None if self.alertmanager_port is None else f"http://{_HOST}:{self.alertmanager_port}"

    @property
    def configuration(self) -> str:
        """Of Prometheus, for the runs that are there now."""
        return configuration(self.folders, self.alertmanager_port, self._interval)

    @property
    def commands(self) -> dict[str, list[str]]:
        """Argument lists, by the server's name."""
        commands = {
            "prometheus": [
                self._programs.prometheus,
                f"--config.file={self.data / 'prometheus.yml'}",
                f"--storage.tsdb.path={self.data / 'prometheus'}",
                f"--web.listen-address={_HOST}:{self.port}",
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
                f"--web.listen-address={_HOST}:{self.alertmanager_port}",
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
        """Takes up runs that began below the folders since the last time; targets of known runs need no help."""
        wanted = self.configuration
        if wanted == self._written:
            return
        (self.data / "prometheus.yml").write_text(wanted)
        self._written = wanted
        if "prometheus" in self._children:
            self._children["prometheus"].send_signal(signal.SIGHUP)

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
