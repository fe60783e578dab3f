"""Test helper: supervised fake ranks on this machine, without a launcher."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mixmae.base.ports import free_port
from mixmae.base.run_directory import attempt_folder
from mixmae.launch.supervision.outcome import Outcome, read_outcome
from tests.helpers import ROOT

ATTEMPT = "one"
FAKE_RANK = "tests.launch.fake_rank"


class Started:
    """The supervisors of a run, by rank."""

    def __init__(self, run_dir: Path, ranks: int, settings: tuple[str, ...], limits: dict[str, float]) -> None:
        self.run_dir, self.folder = run_dir, attempt_folder(run_dir, ATTEMPT)
        self.port, self.secret = free_port(), secrets.token_hex(8)
        self._limits = {"join": 100.0, "stuck": 100.0, "grace": 100.0, **limits}
        self._command = [FAKE_RANK, "--world-size", str(ranks), *settings]
        self.supervisors = [self.start(rank, ranks) for rank in range(ranks)]

    def start(self, rank: int, ranks: int) -> "subprocess.Popen[str]":
        options = {"attempt": ATTEMPT, "run-dir": self.run_dir, "ranks": ranks, "port": self.port}
        options |= {f"{name}-seconds": value for name, value in self._limits.items()}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        rank_env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        environment = {**os.environ, "MIXMAE_TOKEN": self.secret}
        environment |= {name: str(value) for name, value in rank_env.items()}
        return subprocess.Popen(
            [sys.executable, "-m", "mixmae.launch.supervision.rank", *arguments, *self._command],
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def codes(self, seconds: float = 200.0) -> list[int]:
        """Waits for all supervisors; returns their exit codes."""
        return [supervisor.wait(seconds) for supervisor in self.supervisors]

    def outcome(self) -> Outcome:
        outcome = read_outcome(self.folder)
        assert outcome is not None
        return outcome

    def log(self, rank: int) -> str:
        file = self.folder / f"rank-{rank:05d}.log"
        return file.read_text() if file.is_file() else ""

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank that has started."""
        return next(child for child in psutil.Process(self.supervisors[rank].pid).children() if child.name() != "sh")


@contextmanager
def started(run_dir: Path, ranks: int, *settings: str, **limits: float) -> Iterator[Started]:
    """Starts ranks; kills their supervisors at the end."""
    run = Started(run_dir, ranks, settings, limits)
    try:
        yield run
    finally:
        for supervisor in run.supervisors:
            supervisor.kill()
            supervisor.communicate()


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Live processes of a run: those whose environment or command line names its directory."""
    found = []
    for process in psutil.process_iter():
        try:
            named = str(run_dir) in " ".join(process.cmdline()) or str(run_dir) in process.environ().get("RUN_DIR", "")
            if named and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
