"""Ownership of a run directory: only the latest start of a run may publish checkpoints.

A node that the cluster declared dead may still be running, and a command may be run twice. The latest start owns the
run directory; an earlier one checks that before it publishes a checkpoint, and exits.
"""

import json
import os
import platform
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from mixmae.base.files import atomic_write
from mixmae.base.run_directory import CLAIM


class SupersededError(Exception):
    """A later start owns the run directory."""


@dataclass(frozen=True)
class Claim:
    """A start's ownership of a run directory.

    Attributes:
        token: unique to this start, part of the names of its partial checkpoints.
        host, pid, time: of the start's main rank, for error messages; time in seconds since the epoch.
    """

    token: str
    host: str
    pid: int
    time: float

    @classmethod
    def take(cls, run_dir: Path) -> "Claim":
        """Takes over the run directory from an earlier start. Called on the main rank."""
        claim = cls(uuid.uuid4().hex[:12], platform.node(), os.getpid(), time.time())
        atomic_write(run_dir / CLAIM, json.dumps(asdict(claim)) + "\n")
        return claim

    def require(self, run_dir: Path) -> None:
        """Raises SupersededError if a later start owns the run directory."""
        owner = Claim(**json.loads((run_dir / CLAIM).read_text()))
        if owner != self:
            raise SupersededError(f"the run was started again on {owner.host} (process {owner.pid}), which owns it now")
