"""One host: its commands, processes, network link and private mounts."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.namespaces import Namespaces
from tests.cluster.network import set_link

_TIMEOUT = 100.0


@dataclass(frozen=True)
class Host:
    """A host of a running cluster.

    Attributes:
        logs: the machine's folder with the logs of the host's daemons.
        environment: environment variables of every command on the host, added to the caller's.
    """

    name: str
    address: str
    logs: Path
    namespaces: Namespaces = field(repr=False)
    switch: Namespaces = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)

    def popen(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        **options: Any,
    ) -> "subprocess.Popen[str]":
        """Starts a command on the host, in its own session.

        `env` is added to the caller's and the cluster's environment. `options` are Popen's. The pid is the command's
        own, in the machine's PID namespace.
        """
        return self.namespaces.popen(
            command,
            cwd or Path.cwd(),
            env={**os.environ, **self.environment, **(env or {})},
            **{"stdin": subprocess.DEVNULL, "start_new_session": True, **options},
        )

    def run(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float | None = 200,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the host and waits for it; returns its exit code, standard output and standard error.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds; the command is killed, but not its children.
            RuntimeError: `check` is set and the command failed; with its output.
        """
        process = self.popen(command, env, cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if check and process.returncode:
            line = " ".join(map(str, command))
            raise RuntimeError(f"{self.name}: {line}: exit code {process.returncode}: {errors.strip() or output}")
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def processes(self, pattern: str = "") -> list[psutil.Process]:
        """Live processes on the host whose command line matches the regular expression, oldest first.

        Pids are those of the machine's PID namespace.
        """
        found = []
        for process in self.namespaces.processes():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and re.search(pattern, " ".join(process.cmdline())):
                    found.append((process.create_time(), process.pid, process))
            except psutil.NoSuchProcess:
                continue
        return [process for _, _, process in sorted(found, key=lambda item: item[:2])]

    def kill(self, pattern: str, sig: int = signal.SIGKILL) -> int:
        """Sends a signal to every process that `processes(pattern)` finds; returns the number of signals sent."""
        sent = 0
        for process in self.processes(pattern):
            try:
                process.send_signal(sig)
            except psutil.NoSuchProcess:
                continue
            sent += 1
        return sent

    def kill_all_except(self, pattern: str | None) -> None:
        """Kills all processes on the host except those whose command line begins with the regular expression."""
        others = "" if pattern is None else f"^(?!{pattern})"
        deadline = time.monotonic() + _TIMEOUT
        while self.kill(others):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: still running after SIGKILL: {self.processes(others)}")
            time.sleep(0.02)

    def wait_until_exited(self, pattern: str, timeout: float = _TIMEOUT) -> None:
        """Waits until no process matches. Raises TimeoutError with those that remain."""
        deadline = time.monotonic() + timeout
        while left := self.processes(pattern):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: still running after {timeout} s: {left}")
            time.sleep(0.05)

    def disconnect(self) -> None:
        """Takes the link to the switch down: the host keeps running but is unreachable."""
        set_link(self.switch, self.name, up=False)

    def reconnect(self) -> None:
        """Takes the link to the switch up again."""
        set_link(self.switch, self.name, up=True)

    def power_off(self) -> None:
        """Takes the link down and kills all processes on the host; `Cluster.power_on` starts the daemons again."""
        self.disconnect()
        self.kill_all_except(None)

    def reaches(self, other: "Host", port: int = 22, timeout: float = 1.0) -> bool:
        """Whether a TCP connection to the other host's port opens within `timeout` seconds."""
        connect = f"exec 3<>/dev/tcp/{other.address}/{port}"
        return self.run(["timeout", str(timeout), "bash", "-c", connect]).returncode == 0

    def wait_until_reaches(self, other: "Host", port: int = 22, timeout: float = _TIMEOUT) -> None:
        """Waits until a connection to the other host's port opens. Raises TimeoutError if none does."""
        deadline = time.monotonic() + timeout
        while not self.reaches(other, port):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no connection from {self.name} to {other.name}:{port} after {timeout} s")
            time.sleep(0.02)

    def mount_tmpfs(self, path: Path, size: str) -> None:
        """Mounts a tmpfs of `size` (such as 8M) on an existing folder, on this host only."""
        self.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", path], check=True)

    def bind(self, source: Path, target: Path) -> None:
        """Bind-mounts the file or folder `source` on the existing path `target`, on this host only."""
        self.run(["mount", "--bind", source, target], check=True)

    def unmount(self, path: Path) -> None:
        """Unmounts what `mount_tmpfs` or `bind` mounted there, even while it is in use."""
        self.run(["umount", "--lazy", path], check=True)
