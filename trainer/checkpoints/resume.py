"""Continuing from the newest checkpoint that is whole, on any number of ranks and at any ZeRO stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import CHECKPOINTS, NEWEST, checkpoint_history, named_newest
from mixmae.trainer.checkpoints import layout
from mixmae.trainer.checkpoints.files import Wanted, file_name, fill, read_buffers
from mixmae.trainer.checkpoints.layout import DamagedError, Manifest
from mixmae.trainer.checkpoints.pieces import KINDS, MOMENTS, Pieces
from mixmae.trainer.engine.distributed import Ranks, from_main


class NothingWholeError(UsageError):
    """Every checkpoint is damaged: the storage failed, not the call."""

    exit_code = 1


@dataclass(frozen=True)
class Resumed:
    """What a run continues from.

    Attributes:
        notes: why it is not the one that was expected, a line for each reason.
    """

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...]


def resume(engine: Any, run_dir: Path, ranks: Ranks) -> Resumed | None:
    """Loads the newest whole checkpoint into the engine; None in a run directory that has none. To be called by all.

    Raises:
        NothingWholeError: there are, or were, checkpoints, but none is whole.
    """
    found = _newest_whole(run_dir, ranks)
    if found is not None:
        _load(engine, found.folder, found.manifest, ranks)
    return found


def _newest_whole(run_dir: Path, ranks: Ranks) -> Resumed | None:
    candidates, notes, lost = from_main((checkpoint_history(run_dir), _lost_pointer(run_dir), layout.lost(run_dir)))
    for folder in candidates:
        manifest = _verified(folder, ranks, notes)
        if manifest is not None:
            if notes and ranks.is_main:
                layout.point_to(folder)
            return Resumed(folder, manifest, tuple(notes))
    if not candidates and not lost:
        return None
    raise NothingWholeError(
        f"no checkpoint in {run_dir / CHECKPOINTS} is whole: {'; '.join(notes) if candidates else _gone(lost)}; "
        "restore one from a copy, or name another run_dir to start from the beginning"
    )


def _gone(lost: list[str]) -> str:
    """Where the checkpoints that there were are gone, or were set aside by an earlier start."""
    return f"there are only {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}"


def _verified(folder: Path, ranks: Ranks, notes: list[str]) -> Manifest | None:
    """The checkpoint's manifest if all its files hold what was written; ranks share the reading."""
    manifest, fault = None, None
    try:
        manifest = Manifest.read(folder)
        for name in sorted(manifest.files)[ranks.rank :: ranks.world_size]:
            layout.verify_file(folder / name, manifest.files[name])
    except DamagedError as error:
        fault = str(error)
    faults: list[str | None] = [fault] * ranks.world_size
    dist.all_gather_object(faults, fault)
    first = next((fault for fault in faults if fault is not None), None)
    if first is None:
        return manifest
    if ranks.is_main:
        layout.set_aside(folder)
    notes.append(f"{folder.name} is damaged and was set aside: {first}")
    return None


def _lost_pointer(run_dir: Path) -> list[str]:
    pointed = named_newest(run_dir)
    if pointed is not None and pointed.is_dir():
        return []
    return [f"{CHECKPOINTS}/{NEWEST} names no checkpoint that is there, the last one was taken"]


def _load(engine: Any, folder: Path, manifest: Manifest, ranks: Ranks) -> None:
    pieces = Pieces(engine)
    assert pieces.shapes == dict(manifest.shapes), "the recipe was compared before; it makes the shapes"
    pieces.begin(manifest.optimizer_step)
    kinds = KINDS if manifest.optimizer_step else tuple(kind for kind in KINDS if kind not in MOMENTS)
    wanted = (
        Wanted(kind, piece.name, piece.start, pieces.values(piece, kind)) for piece in pieces.held for kind in kinds
    )
    fill(list(wanted), manifest.paths(folder, ranks.rank))
    buffers = read_buffers(folder / file_name(0))
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(buffers[name])
    pieces.settle()
    engine.global_steps = manifest.step
    engine.global_samples = manifest.state["samples"]
    engine.skipped_steps = manifest.state["skipped"]
    dist.barrier()
