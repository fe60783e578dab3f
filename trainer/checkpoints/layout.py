"""Names of a run's checkpoints, and which of them it resumes from. No torch: launchers look here too."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER, NEWEST = "checkpoints", "newest"
_COMPLETE, _PARTIAL, _DAMAGED = "step-", "partial-", "damaged-"


def name_of(step: int) -> str:
    return f"{_COMPLETE}{step:08d}"


def partial_name_of(step: int, token: str) -> str:
    """The name of a checkpoint while it is written, or removed, by the start with that token."""
    return f"{_PARTIAL}{step:08d}-{token}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_COMPLETE))


def complete(run_dir: Path) -> list[Path]:
    """Checkpoints under their final names, oldest first."""
    return sorted(path for path in (run_dir / FOLDER).glob(f"{_COMPLETE}*") if path.is_dir())


def leftovers(run_dir: Path) -> list[Path]:
    """Partial checkpoints of saves that were interrupted."""
    return [path for path in (run_dir / FOLDER).glob(f"{_PARTIAL}*") if path.is_dir()]


def history(run_dir: Path) -> Iterator[Path]:
    """Checkpoints to resume from, in order of preference: the one that `newest` names, then those before it.

    Where `newest` is missing or names none that exists, all of them, the newest first.
    """
    found = complete(run_dir)
    named = pointed(run_dir)
    last = named if named in found else (found[-1] if found else None)
    yield from (path for path in reversed(found) if last is not None and path.name <= last.name)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that the run would resume from, its content not yet verified; None if nothing was saved."""
    return next(history(run_dir), None)


def newest_step(run_dir: Path) -> int:
    """The step that the run would resume from; 0 if nothing was saved."""
    newest = newest_checkpoint(run_dir)
    return step_of(newest) if newest is not None else 0


def pointed(run_dir: Path) -> Path | None:
    """The checkpoint that `newest` names, whether or not it exists; None if the name is not one of a checkpoint."""
    pointer = run_dir / FOLDER / NEWEST
    name = pointer.read_bytes().decode(errors="replace").strip() if pointer.is_file() else ""
    return run_dir / FOLDER / name if re.fullmatch(rf"{_COMPLETE}\d+", name) else None


def lost(run_dir: Path) -> list[str]:
    """Traces of checkpoints in a run that has none: those set aside, and the pointer to the newest."""
    aside = sorted(path.name for path in (run_dir / FOLDER).glob(f"{_DAMAGED}*"))
    return [*aside, *([NEWEST] if (run_dir / FOLDER / NEWEST).exists() else [])]


def point_to(checkpoint: Path) -> None:
    """Makes a checkpoint the newest, atomically."""
    partial = checkpoint.parent / f".{NEWEST}"
    partial.write_text(checkpoint.name + "\n")
    sync(partial)
    partial.replace(checkpoint.parent / NEWEST)
    sync(checkpoint.parent)


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that no run resumes from it; returns its new path."""
    aside = checkpoint.with_name(_DAMAGED + checkpoint.name)
    for attempt in range(1, 1000):
        if not aside.exists():
            break
        aside = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}-{attempt}")
    checkpoint.rename(aside)
    return aside


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
