"""The run directory: names of all that a run leaves behind, and its newest checkpoint, for writers and readers alike.

recipe.yaml      resolved, with every default        events.jsonl     a line per logged step and per event
shards.json      the shards it is trained on         restarts.jsonl   a line per start that ended and was followed
versions.json    what it ran with                    claimed.json     the start that has the run now
checkpoints/     step-00001000/ and so on, `newest`  logs/            a folder for each start: ranks' output, outcome
tensorboard/     curves and pictures                 pictures/        reconstructions, step by step
replaced/        by rank, samples not usable         samples/         by rank, used at each step (`log.samples`)
launches/        by launch, the recipe that its ranks read
owner.json       the process that has the run now, while it lives
monitoring/      targets/, for Prometheus            wandb/           the files of Weights & Biases
"""

import re
from pathlib import Path

RECIPE, SHARDS, VERSIONS = "recipe.yaml", "shards.json", "versions.json"
CLAIM, OWNER = "claimed.json", "owner.json"
EVENTS, RESTARTS = "events.jsonl", "restarts.jsonl"
TENSORBOARD, PICTURES, WANDB = "tensorboard", "pictures", "wandb"
REPLACED, SAMPLES = "replaced", "samples"
LOGS, OUTCOME = "logs", "outcome.json"
LAUNCHES = "launches"
CHECKPOINTS, NEWEST = "checkpoints", "newest"
_STEP = "step-"
_CHECKPOINT = re.compile(rf"{_STEP}(\d+)")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory.

    Raises:
        OSError: it cannot be read.
    """
    return (folder / RECIPE).is_file() or (folder / EVENTS).is_file()


def runs_below(folder: Path, depth: int = 3) -> list[Path]:
    """The folder itself if it is a run directory, else those below it, by name; not what lies within runs.

    Raises:
        OSError: it cannot be read.
    """
    if is_run(folder):
        return [folder]
    try:
        names = sorted(folder.iterdir()) if depth > 0 else []
    except (FileNotFoundError, NotADirectoryError):
        return []
    below = [path for path in names if path.is_dir() and not path.name.startswith(".")]
    return [run for path in below for run in runs_below(path, depth - 1)]


def targets_folder(run_dir: Path) -> Path:
    """Where the exporters of a run announce themselves to Prometheus, one file per node."""
    return run_dir / "monitoring" / "targets"


def rank_records(folder: Path, rank: int) -> Path:
    """A rank's own file in a folder such as REPLACED or SAMPLES."""
    return folder / f"rank-{rank:05d}.jsonl"


def all_rank_records(folder: Path) -> list[Path]:
    """The files of all ranks, by rank."""
    return sorted(folder.glob("rank-*.jsonl"))


def attempt_folder(run_dir: Path, attempt: str) -> Path:
    """Where everything about one start of a run goes."""
    return run_dir / LOGS / attempt


def checkpoint_name(step: int) -> str:
    return f"{_STEP}{step:08d}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step of a checkpoint, whose name must be one."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints under their final names, oldest first; not what looks like one, such as somebody's copy."""
    found = [path for path in (run_dir / CHECKPOINTS).glob(f"{_STEP}*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(path for path in found if path.is_dir())


def checkpoint_history(run_dir: Path) -> list[Path]:
    """Checkpoints to resume from, in order of preference: the one that `newest` names, then those before it.

    Where `newest` is missing or names none that exists, all of them, the newest first.
    """
    found = complete_checkpoints(run_dir)
    named = named_newest(run_dir)
    last = named if named in found else found[-1] if found else None
    return [path for path in reversed(found) if last is not None and path.name <= last.name]


def named_newest(run_dir: Path) -> Path | None:
    """The checkpoint that `newest` names, whether or not it exists; None if the name is not one of a checkpoint."""
    pointer = run_dir / CHECKPOINTS / NEWEST
    name = pointer.read_bytes().decode(errors="replace").strip() if pointer.is_file() else ""
    return run_dir / CHECKPOINTS / name if _CHECKPOINT.fullmatch(name) else None


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that the run would resume from, its content not yet verified; None if nothing was saved."""
    return next(iter(checkpoint_history(run_dir)), None)


def newest_step(run_dir: Path) -> int:
    """The step that the run would resume from; 0 if nothing was saved."""
    newest = newest_checkpoint(run_dir)
    return checkpoint_step(newest) if newest is not None else 0
