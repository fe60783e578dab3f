"""Which start of a run may publish checkpoints in its directory: the newest.

A node that its cluster declared dead may live on, and a command may be typed twice. The last start owns the run
directory; an earlier one finds out before it publishes, and ends.
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
        token: distinguishes this start's files from those of others.
        host, pid, time: of the start's main rank, for the messages of others; seconds since the epoch.
    """

    token: str
    host: str
    pid: int
    time: float

    @classmethod
    def take(cls, run_dir: Path) -> "Claim":
        """Takes the run directory over from the start that owned it; for the main rank."""
        claim = cls(uuid.uuid4().hex[:12], platform.node(), os.getpid(), time.time())
        atomic_write(run_dir / CLAIM, json.dumps(asdict(claim)) + "\n")
        return claim

    def require(self, run_dir: Path) -> None:
        """Raises SupersededError if a later start took the run directory."""
        now = Claim(**json.loads((run_dir / CLAIM).read_text()))
        if now != self:
            raise SupersededError(f"the run was started again on {now.host} (process {now.pid}), which has it now")
