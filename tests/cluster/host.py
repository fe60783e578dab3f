"""One host: commands, processes, its link, its clock, its private file systems."""

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

_PATIENCE = 100.0


@dataclass(frozen=True)
class Host:
    """A host of a running cluster.

    Attributes:
        logs: the machine's folder with what its daemons wrote.
        environment: what every command here gets in its environment, on top of the caller's.
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
        """Starts a command here, in a session of its own; `env` is added to the caller's environment and the cluster's.

        `options` are Popen's. Its pid is the machine's number for the command itself.
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
        """Runs a command here to its end; returns its exit code, standard output and standard error.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds; the command is killed, but not what it started.
            RuntimeError: `check` is set and the command failed; says what it wrote.
        """
        process = self.popen(command, env, cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if check and process.returncode:
            typed = " ".join(map(str, command))
            raise RuntimeError(f"{self.name}: {typed} ended with {process.returncode}: {errors.strip() or output}")
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def processes(self, pattern: str = "") -> list[psutil.Process]:
        """Live processes here whose command line holds the regular expression, oldest first; pids are the machine's."""
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
        """Sends a signal to every process that `processes(pattern)` finds; returns how many got it."""
        sent = 0
        for process in self.processes(pattern):
            try:
                process.send_signal(sig)
            except psutil.NoSuchProcess:
                continue
            sent += 1
        return sent

    def kill_all_but(self, pattern: str | None) -> None:
        """Kills all processes here, save those whose command line begins with the regular expression."""
        doomed = "" if pattern is None else f"^(?!{pattern})"
        deadline = time.monotonic() + _PATIENCE
        while self.kill(doomed):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: still running after SIGKILL: {self.processes(doomed)}")
            time.sleep(0.02)

    def wait_until_gone(self, pattern: str, timeout: float = _PATIENCE) -> None:
        """Waits until no process matches. Raises TimeoutError with those that are left."""
        deadline = time.monotonic() + timeout
        while left := self.processes(pattern):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: still running after {timeout} s: {left}")
            time.sleep(0.05)

    def cut(self) -> None:
        """Takes the link to the switch down: the host lives on, and nobody reaches it."""
        set_link(self.switch, self.name, up=False)

    def restore(self) -> None:
        """Takes the link up again."""
        set_link(self.switch, self.name, up=True)

    def power_off(self) -> None:
        """Ends everything here at once, and nobody hears of it; `Cluster.power_on` starts the daemons again."""
        self.cut()
        self.kill_all_but(None)

    def reaches(self, other: "Host", port: int = 22, timeout: float = 1.0) -> bool:
        """Whether a TCP connection to the other host's port opens within `timeout` seconds."""
        connect = f"exec 3<>/dev/tcp/{other.address}/{port}"
        return self.run(["timeout", str(timeout), "bash", "-c", connect]).returncode == 0

    def wait_until_reaches(self, other: "Host", port: int = 22, timeout: float = _PATIENCE) -> None:
        """Waits until a connection to the other host's port opens. Raises TimeoutError if none does."""
        deadline = time.monotonic() + timeout
        while not self.reaches(other, port):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{other.name} does not answer {self.name} at port {port} after {timeout} s")
            time.sleep(0.02)

    def mount_tmpfs(self, path: Path, size: str) -> None:
        """Puts a file system of `size` (such as 8M) in memory on an existing folder, on this host alone."""
        self.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", path], check=True)

    def bind(self, source: Path, target: Path) -> None:
        """Shows the file or folder `source` at the existing path `target`, on this host alone."""
        self.run(["mount", "--bind", source, target], check=True)

    def unmount(self, path: Path) -> None:
        """Takes away what `mount_tmpfs` or `bind` put there, even while it is used."""
        self.run(["umount", "--lazy", path], check=True)
