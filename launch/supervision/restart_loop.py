"""Starts a job from this host, and restarts it as long as it makes progress."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from mixmae.base.ownership import Holding
from mixmae.launch.backends.job_spec import Attempt, Command, JobSpec, new_attempt
from mixmae.launch.supervision.launcher import run_attempt
from mixmae.launch.supervision.restarts import decide, print_outcome, record_restart


class Backend(Protocol):
    """Starts ranks: `LocalBackend` or `HostfileBackend`; Slurm follows its jobs by itself."""

    @property
    def ranks(self) -> int: ...

    @property
    def address(self) -> str:
        """Where rank 0's supervisor listens, as seen from all ranks and from this process."""

    def command(self, job: JobSpec, attempt: Attempt, environment: Mapping[str, str]) -> Command: ...

    def distribute(self, files: Mapping[Path, str]) -> None: ...

    def kill_leftovers(self, attempt: Attempt) -> None: ...


def run_with_restarts(job: JobSpec, backend: Backend, max_restarts: int, holding: Holding | None = None) -> int:
    """Runs a job to its end; returns its exit code.

    Args:
        max_restarts: restarts in a row without a new checkpoint after which the run is given up.
        holding: the run, which no restart may take back from another launch.

    Raises:
        UsageError: the backend cannot start it, or another launch took the run over.
    """
    launch = None
    while True:
        attempt = new_attempt(job)
        launch = launch or attempt.name
        outcome = run_attempt(backend.command(job, attempt, os.environ), backend, attempt, job.run_dir)
        decision = decide(job.run_dir, launch, outcome, max_restarts)
        print_outcome(outcome, decision)
        if not decision.restart:
            return decision.exit_code(outcome)
        time.sleep(decision.delay)
        if holding is not None:
            holding.require()
        record_restart(job.run_dir, launch, attempt.name, outcome)
