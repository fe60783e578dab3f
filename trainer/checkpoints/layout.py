"""Partial and damaged checkpoints, and the `newest` file. Names of complete ones: mixmae.base.run_directory."""

from pathlib import Path

from mixmae.base.files import atomic_write
from mixmae.base.run_directory import CHECKPOINTS, NEWEST, complete_checkpoints, named_newest

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


def inconsistencies(run_dir: Path) -> list[str]:
    """Why a resume may not be from the last checkpoint: `newest` is lost, or a kill came before it was written."""
    newest = named_newest(run_dir)
    if newest is None or not newest.is_dir():
        return [f"{CHECKPOINTS}/{NEWEST} names no existing checkpoint; using the last complete one"]
    later = [folder.name for folder in complete_checkpoints(run_dir) if folder.name > newest.name]
    return [
        f"{name} is later than {newest.name}, which {CHECKPOINTS}/{NEWEST} names, and is not used" for name in later
    ]


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
