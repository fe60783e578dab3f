"""Runs launched as a user does: `mixmae launch` with one of three backends, restarted with the same command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mixmae.base import jsonl
from mixmae.base.exit_codes import FAILED
from mixmae.base.run_directory import CHECKPOINTS, EVENTS, LOGS, RESTARTS
from mixmae.trainer.checkpoints.layout import leftovers
from tests.cluster.cluster import Cluster
from tests.cluster.host import Host
from tests.cluster.slurm import ENDED
from tests.helpers import ROOT

_POLL_SECONDS, _JOB_SECONDS = 0.1, 0.5
_RANK = r" -m mixmae\.trainer\.train "
_ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
"""One thread, so that the order of additions does not depend on how many ranks share a host."""


@dataclass(frozen=True)
class Local:
    """Ranks on one host."""

    ranks: int
    host: str = "node1"
    name = "local"
    host_count = 1

    def options(self, folder: Path) -> list[str]:
        return ["--local", str(self.ranks)]


@dataclass(frozen=True)
class Hostfile:
    """`slots` ranks on each host, through DeepSpeed's launcher with pdsh and ssh."""

    hosts: Sequence[str]
    slots: int = 1
    host: str = "login"
    name = "hostfile"

    @property
    def ranks(self) -> int:
        return len(self.hosts) * self.slots

    @property
    def host_count(self) -> int:
        return len(self.hosts)

    def options(self, folder: Path) -> list[str]:
        hostfile = folder.with_suffix(".hosts")
        hostfile.write_text("".join(f"{host} slots={self.slots}\n" for host in self.hosts))
        return ["--hostfile", str(hostfile), "--skip-preflight"]


@dataclass(frozen=True)
class SlurmJob:
    """A Slurm job with `tasks` ranks on each of its nodes."""

    nodes: int
    tasks: int = 1
    limit: str | None = None
    host: str = "login"
    name = "slurm"

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks

    @property
    def host_count(self) -> int:
        return self.nodes

    def options(self, folder: Path) -> list[str]:
        limit = ["--time", self.limit] if self.limit else []
        tasks = ["--tasks-per-node", str(self.tasks)]
        return ["--slurm", "--nodes", str(self.nodes), *tasks, *limit, "--skip-preflight"]


Backend = Local | Hostfile | SlurmJob
"""Each has `host` (where the command runs), `ranks` (world size) and `host_count` (hosts with ranks)."""


class Run:
    """One run directory, and the command that starts it.

    Attributes:
        backend: backend of the next start.
        starts: how often the command was run.
        launcher: process of the last `mixmae launch`; None under Slurm.
        job: id of the last Slurm job.
        mounted: a host and the path in the run directory where this host alone has a file system mounted.
    """

    def __init__(self, cluster: Cluster, backend: Backend, recipe: Path, run_dir: Path) -> None:
        self.cluster, self.backend, self.recipe, self.run_dir = cluster, backend, recipe, run_dir
        self.starts = 0
        self.launcher: subprocess.Popen[str] | None = None
        self.job: int | None = None
        self._next_poll = 0.0
        self.mounted: tuple[Host, Path] | None = None
        self._console = run_dir.with_suffix(".out")
        self._console.unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        """The run directory as the run's hosts see it."""
        if self.mounted is None:
            return self.run_dir
        return Path(f"/proc/{self.mounted[0].namespaces.pid}/root{self.run_dir}")

    def start(self, max_restarts: int = 0, *overrides: str) -> None:
        """Runs the launch command; returns at once, under Slurm when the job is submitted."""
        self.starts += 1
        options = [*self.backend.options(self.run_dir), "--max-restarts", str(max_restarts), *overrides]
        command = [sys.executable, "-m", "mixmae.launch.cli", "launch", str(self.recipe), *options]
        host = self.cluster.host(self.backend.host)
        self.job = None
        if isinstance(self.backend, SlurmJob):
            self.job = int(host.run(command, _ENVIRONMENT, ROOT, check=True).stdout)
            return
        with self._console.open("a") as console:
            both = {"stdout": console, "stderr": subprocess.STDOUT}
            self.launcher = host.popen(command, _ENVIRONMENT, ROOT, **both)

    def poll(self) -> int | None:
        """The exit code of the last start; None while it runs, or will be restarted by Slurm."""
        if self.job is None:
            assert self.launcher is not None
            return self.launcher.poll()
        if time.monotonic() < self._next_poll:
            return None
        state = self.cluster.slurm.state(self.job)
        self._next_poll = time.monotonic() + _JOB_SECONDS
        if state not in ENDED:
            return None
        return 0 if state == "COMPLETED" else self.cluster.slurm.exit_code(self.job) or FAILED

    def wait(self, seconds: float) -> int:
        """Waits for the exit code of the last start.

        Raises:
            TimeoutError: it still runs after `seconds`; with the end of its output.
        """
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run did not exit in {seconds:.0f} s; its output:\n{self.output()[-3000:]}")
            time.sleep(_POLL_SECONDS)
        return code

    def output(self) -> str:
        """Console output of all starts, or output of all jobs."""
        texts = [self._console] if self._console.exists() else []
        texts += sorted((self.folder / LOGS).glob("slurm-*.out"))
        return "".join(path.read_text(errors="replace") for path in texts)

    def events(self) -> list[dict[str, Any]]:
        """Records of events.jsonl so far, oldest first; truncated lines are skipped."""
        return jsonl.read(self.folder / EVENTS)

    def restarts(self) -> list[dict[str, Any]]:
        """Records of restarts.jsonl: the launcher's automatic restarts, oldest first."""
        return jsonl.read(self.folder / RESTARTS)

    def step(self) -> int:
        """The last logged step; 0 before the first."""
        return next((record["step"] for record in reversed(self.events()) if record["event"] == "step"), 0)

    def training_starts(self) -> int:
        """Number of starts that reached training."""
        return sum(record["event"] in ("start", "resumed") for record in self.events())

    def partial_checkpoints(self) -> list[Path]:
        """Checkpoints that are being written."""
        return leftovers(self.folder)

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def ranks(self) -> dict[int, tuple[Host, psutil.Process]]:
        """Live processes of the ranks, with their hosts, by rank."""
        found = {}
        for host in (self.cluster.login, *self.cluster.hosts):
            for process in host.processes(_RANK):
                try:
                    found[int(process.environ()["RANK"])] = (host, process)
                except (psutil.NoSuchProcess, KeyError):
                    continue
        return found


def clean_environment() -> None:
    """Removes from this process variables and signal dispositions that runs would inherit."""
    # Under nohup SIGHUP is ignored, in a shell's background job SIGINT, and children inherit that; no handler, though.
    signal.signal(signal.SIGHUP, lambda *_: None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
