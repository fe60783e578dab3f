"""A job started, and started again while it gets on, from this host."""

import os
import shlex
import time
from collections.abc import Mapping
from typing import Protocol

from mixmae.launch.backends.job import Attempt, Command, Job, new_attempt
from mixmae.launch.supervision.attempt import run_attempt
from mixmae.launch.supervision.restarts import decide, record_restart, say


class Way(Protocol):
    """How ranks are started: `mixmae.launch.backends.local.Local`, `mixmae.launch.backends.hostfile.OnHosts`."""

    @property
    def ranks(self) -> int: ...

    @property
    def address(self) -> str:
        """At which all ranks, and this process, reach the first one."""

    def command(self, job: Job, attempt: Attempt, environment: Mapping[str, str]) -> Command: ...

    def sweep(self, attempt: Attempt) -> None: ...


def run(job: Job, way: Way, max_restarts: int) -> int:
    """Runs a job to its end; returns its exit code.

    Args:
        max_restarts: so many restarts in a row that save no further checkpoint are the last.

    Raises:
        UsageError: it cannot be started like this.
    """
    launch = None
    while True:
        attempt = new_attempt(job)
        launch = launch or attempt.name
        outcome = run_attempt(way.command(job, attempt, os.environ), way, attempt, job.run_dir)
        decision = decide(job.run_dir, launch, outcome, max_restarts)
        say(outcome, decision)
        if not decision.again:
            return decision.exit_code(outcome)
        time.sleep(decision.delay)
        record_restart(job.run_dir, launch, attempt.name, outcome)


def in_words(command: Command) -> str:
    """A command as a shell would be told it, after the files that go with it."""
    files = [f"# {path}\n{text}" for path, text in command.files.items()]
    variables = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
    return "\n".join([*files, " ".join([*variables, shlex.join(command.arguments)])])
