"""Checkpoints that are not complete: on their way in or out, damaged, or lost. Names: mixmae.base.run_directory."""

from pathlib import Path

from mixmae.base.files import atomic_write
from mixmae.base.run_directory import CHECKPOINTS, NEWEST

_PARTIAL, _DAMAGED = "partial-", "damaged-"


def partial_name_of(step: int, token: str) -> str:
    """The name of a checkpoint while it is written, or removed, by the start with that token."""
    return f"{_PARTIAL}{step:08d}-{token}"


def leftovers(run_dir: Path) -> list[Path]:
    """Partial checkpoints of saves that were interrupted."""
    return [path for path in (run_dir / CHECKPOINTS).glob(f"{_PARTIAL}*") if path.is_dir()]


def lost(run_dir: Path) -> list[str]:
    """Traces of checkpoints in a run that has none: those set aside, and the pointer to the newest."""
    aside = sorted(path.name for path in (run_dir / CHECKPOINTS).glob(f"{_DAMAGED}*"))
    return [*aside, *([NEWEST] if (run_dir / CHECKPOINTS / NEWEST).exists() else [])]


def point_to(checkpoint: Path) -> None:
    """Makes a checkpoint the newest, atomically."""
    atomic_write(checkpoint.parent / NEWEST, checkpoint.name + "\n")


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that no run resumes from it; returns its new path."""
    aside = checkpoint.with_name(_DAMAGED + checkpoint.name)
    for attempt in range(1, 1000):
        if not aside.exists():
            break
        aside = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}-{attempt}")
    checkpoint.rename(aside)
    return aside
