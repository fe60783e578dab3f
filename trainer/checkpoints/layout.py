"""Partial and damaged checkpoints, and the `newest` file. Names of complete ones: mixmae.base.run_directory."""

from pathlib import Path

from mixmae.base.files import atomic_write
from mixmae.base.run_directory import CHECKPOINTS, NEWEST

_PARTIAL, _DAMAGED = "partial-", "damaged-"


def partial_name_of(step: int, token: str) -> str:
    """The directory name of a checkpoint while the start with this token writes or deletes it."""
    return f"{_PARTIAL}{step:08d}-{token}"


def leftovers(run_dir: Path) -> list[Path]:
    """Partial checkpoints of interrupted saves."""
    return [path for path in (run_dir / CHECKPOINTS).glob(f"{_PARTIAL}*") if path.is_dir()]


def remnants(run_dir: Path) -> list[str]:
    """Names that show that a run without complete checkpoints once had some: quarantined ones, and `newest`."""
    quarantined = sorted(path.name for path in (run_dir / CHECKPOINTS).glob(f"{_DAMAGED}*"))
    return [*quarantined, *([NEWEST] if (run_dir / CHECKPOINTS / NEWEST).exists() else [])]


def set_newest(checkpoint: Path) -> None:
    """Points `newest` to a checkpoint, atomically."""
    atomic_write(checkpoint.parent / NEWEST, checkpoint.name + "\n")


def quarantine(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint to `damaged-...`, so that no run resumes from it; returns its new path."""
    target = checkpoint.with_name(_DAMAGED + checkpoint.name)
    for attempt in range(1, 1000):
        if not target.exists():
            break
        target = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}-{attempt}")
    checkpoint.rename(target)
    return target
