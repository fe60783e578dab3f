"""What a backend starts: a module as a number of ranks; one start of it; the command that does it."""

import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mixmae.base.run_directory import attempt_folder
from mixmae.launch.supervision.token import TOKEN
from mixmae.trainer.recipe.sections.launch import Launch

FIRST_PORT, PORT_BLOCKS, PORT_BLOCK = 20_000, 300, 32
"""Ports of starts that name none: below those that Linux gives to outgoing connections."""


@dataclass(frozen=True)
class JobSpec:
    """A module that runs as ranks.

    Attributes:
        module: run by `python -m`; takes `--world-size N` first, and refuses to run with another number of ranks.
        arguments: what follows.
        run_dir: where logs and records go.
        private: contents of files that ranks read, by path, on every host; for their owner alone.
    """

    module: str
    arguments: Sequence[str]
    run_dir: Path
    settings: Launch = field(default_factory=Launch)
    private: Mapping[Path, str] = field(default_factory=dict)

    def rank_arguments(
        self, ranks: int, attempt: str, port: str, launcher: bool, environment: Path | None = None
    ) -> list[str]:
        """What follows `python -m mixmae.launch.supervision.rank`.

        Args:
            launcher: whether the launching process stays connected until the run ends.
            environment: file with more variables.
        """
        settings = self.settings
        options = {
            "attempt": attempt,
            "run-dir": str(self.run_dir),
            "ranks": str(ranks),
            "port": port,
            "join-seconds": f"{settings.join_seconds:g}",
            "stuck-seconds": f"{settings.stuck_seconds:g}",
            "grace-seconds": f"{settings.grace_seconds:g}",
            **({"environment": str(environment)} if environment is not None else {}),
        }
        given = [text for name, value in options.items() for text in (f"--{name}", value)]
        return [*given, *(["--launcher"] if launcher else []), self.module, "--world-size", str(ranks), *self.arguments]


@dataclass(frozen=True)
class Attempt:
    """One start of a job.

    Attributes:
        name: of its folder in the run directory.
        port: the first of those on which rank 0's supervisor may listen.
        secret: authenticates supervisors to each other.
    """

    name: str
    port: int
    secret: str

    def folder(self, run_dir: Path) -> Path:
        return attempt_folder(run_dir, self.name)


def new_attempt(job: JobSpec) -> Attempt:
    """A start with a new name and secret."""
    name = base = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    number = 1
    while attempt_folder(job.run_dir, name).exists():
        number += 1
        name = f"{base}-{number}"
    port = job.settings.port or FIRST_PORT + PORT_BLOCK * secrets.randbelow(PORT_BLOCKS)
    return Attempt(name, port, secrets.token_hex(16))


@dataclass(frozen=True)
class Command:
    """What a backend runs to start the ranks.

    Attributes:
        arguments: the command line.
        environment: variables set in addition to this process's own.
        files: contents by path, written while the command runs and readable by their owner alone.
        private: more such files, on every host.
        unset: variables of this process that it does not get.
    """

    arguments: Sequence[str]
    environment: dict[str, str]
    files: dict[Path, str] = field(default_factory=dict)
    private: Mapping[Path, str] = field(default_factory=dict)
    unset: Sequence[str] = ()

    def environment_in(self, environment: Mapping[str, str]) -> dict[str, str]:
        """All variables that it gets, started from a process with this environment."""
        kept = {name: value for name, value in environment.items() if name not in self.unset}
        return {**kept, **self.environment}

    def describe(self) -> str:
        """The files, then the command as one would type it in a shell; what is private is named only."""
        files = [f"# {path}\n{text}" for path, text in self.files.items()]
        private = [f"# {path}, on every host, for its owner alone" for path in self.private]
        unset = ["env", *(f"--unset={name}" for name in self.unset)] if self.unset else []
        shown = {name: "..." if name == TOKEN else value for name, value in self.environment.items()}
        variables = [f"{name}={shlex.quote(value)}" for name, value in shown.items()]
        return "\n".join([*files, *private, " ".join([*unset, *variables, shlex.join(self.arguments)])])
