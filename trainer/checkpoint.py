"""Saving and resuming a run. A checkpoint has its name only when every rank's part is on disk.

RUN/checkpoints/step-00001000/     what DeepSpeed writes: model and optimizer, sharded by rank
RUN/checkpoints/newest             the name of the newest complete one
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.config import Recipe, Section
from trainer.data.stream import Position
from trainer.distributed import Ranks
from trainer.errors import UsageError
from trainer.recipes import parse_recipe
from trainer.state import TrainState

NEWEST = "newest"
_KEY = "mixmae"
"""Everything of ours in DeepSpeed's client state stands under this one key; it is the same on every rank."""
_MAY_CHANGE = {
    "run_dir",
    "data.shards",
    "data.num_workers",
    "data.prefetch_factor",
    "data.max_bad_share",
    "data.network",
    "data.cache",
    "train.compile",
    "checkpoint",
    "launch",
    "log",
    "monitoring",
    "train.activation_checkpointing",
    "train.max_skipped_steps",
    "model.init",
}
"""Settings that a resumed run may change: none of them changes what is computed, but for rounding."""


def save(engine: Any, recipe: Recipe, state: TrainState, position: Position, ranks: Ranks) -> Path:
    """Writes a checkpoint on all ranks and returns its folder; also prunes the ones that are not kept."""
    folder = recipe.run_dir / "checkpoints"
    partial, final = f"partial-{state.step:08d}", f"step-{state.step:08d}"
    if ranks.is_main:
        shutil.rmtree(folder / partial, ignore_errors=True)
    dist.barrier()
    ours = {
        "state": state.state_dict(),
        "position": vars(position),
        "recipe": recipe.model_dump(mode="json"),
        "world_size": ranks.world_size,
    }
    engine.save_checkpoint(str(folder), tag=partial, client_state={_KEY: ours}, save_latest=False)
    _sync_folder(folder / partial, ranks)
    dist.barrier()
    if ranks.is_main:
        given_up = folder / f"partial-before-{final}"
        if (folder / final).exists():  # of a history that was left by hand, for an earlier checkpoint
            (folder / final).rename(given_up)
        (folder / partial).rename(folder / final)
        _point_to(folder, final)
        shutil.rmtree(given_up, ignore_errors=True)
        for stale in _not_kept(complete(recipe.run_dir), folder / final, recipe.checkpoint.keep):
            shutil.rmtree(stale)
    dist.barrier()
    return folder / final


def resume(engine: Any, recipe: Recipe, ranks: Ranks) -> tuple[TrainState, Position] | None:
    """Continues from the newest checkpoint: state and position, or None in a run directory without any.

    Raises:
        UsageError: the newest checkpoint is of another recipe or number of ranks.
    """
    newest = newest_checkpoint(recipe.run_dir)
    if newest is None:
        return None
    loaded, client_state = engine.load_checkpoint(str(newest.parent), tag=newest.name)
    assert loaded is not None, newest
    ours = client_state[_KEY]
    if ours["world_size"] != ranks.world_size:
        raise UsageError(_other_ranks(newest, ours["world_size"], ranks))
    require_same_recipe(recipe, ours["recipe"], recipe.run_dir)
    return TrainState.from_state_dict(ours["state"]), Position(**ours["position"])


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint's folder, or None where nothing was ever saved.

    Raises:
        UsageError: checkpoints exist, but the one that is named the newest does not.
    """
    folder = run_dir / "checkpoints"
    found = complete(run_dir)
    if not (folder / NEWEST).is_file():
        if found:
            raise UsageError(
                f"{folder / NEWEST} is missing although {len(found)} checkpoints are there; write the name of "
                f"one into it (the last is {found[-1].name}), or start another run_dir"
            )
        return None
    newest = folder / (folder / NEWEST).read_text().strip()
    if newest not in found:
        raise UsageError(
            f"checkpoint {newest} is missing; there are {', '.join(f.name for f in found) or 'none'}: write "
            f"the name of one into {folder / NEWEST}, or start another run_dir"
        )
    return newest


def complete(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir())


def require_same_recipe(recipe: Recipe, earlier: dict[str, Any], run_dir: Path) -> None:
    """Raises UsageError if `recipe` would compute something else than the run directory's own."""
    before = parse_recipe(earlier, str(run_dir / "recipe.yaml"))
    differences = [d for d in _differences(before, recipe) if not any(d[0].startswith(free) for free in _MAY_CHANGE)]
    if differences:
        shown = ", ".join(f"{path} ({then} then, {now} now)" for path, then, now in differences[:3])
        raise UsageError(
            f"run_dir={run_dir} belongs to another recipe: {shown}; set what differs as it was, or name another run_dir"
        )


def _differences(before: Section, now: Section, prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for name in type(now).model_fields:
        a, b = getattr(before, name), getattr(now, name)
        if isinstance(b, Section):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append((prefix + name, a, b))
    return found


def check_resumable(recipe: Recipe, ranks: Ranks) -> None:
    """Raises UsageError if the run directory's newest checkpoint cannot be continued; needs no process group."""
    checkpoint = newest_checkpoint(recipe.run_dir)
    if checkpoint is None:
        return
    shards = len(list(checkpoint.glob("*zero_pp_rank_*_optim_states.pt")))
    if recipe.train.zero_stage > 0 and shards != ranks.world_size:
        raise UsageError(_other_ranks(checkpoint, shards, ranks))


def _other_ranks(checkpoint: Path, saved_by: int, ranks: Ranks) -> str:
    return f"{checkpoint} was saved by {saved_by} ranks, this run has {ranks.world_size}; resume with {saved_by} ranks"


def _not_kept(checkpoints: list[Path], newest: Path, keep: int) -> list[Path]:
    """All but the last `keep` up to the newest; what lies behind it belongs to a history that was given up."""
    history = [checkpoint for checkpoint in checkpoints if checkpoint.name <= newest.name]
    return [checkpoint for checkpoint in checkpoints if checkpoint not in history[-keep:]]


def _sync_folder(folder: Path, ranks: Ranks) -> None:
    """Puts this rank's files on disk; they carry its number, and the main rank takes the shared ones along."""
    for file in folder.iterdir():
        if ranks.is_main or f"rank_{ranks.rank}_" in file.name:
            _fsync(file)
    _fsync(folder)


def _point_to(folder: Path, name: str) -> None:
    partial = folder / f".{NEWEST}"
    partial.write_text(name + "\n")
    _fsync(partial)
    partial.replace(folder / NEWEST)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
