"""Resuming from the newest intact checkpoint, on any number of ranks and at any ZeRO stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import CHECKPOINTS, NEWEST, checkpoint_history, named_newest
from mixmae.trainer.checkpoints import layout
from mixmae.trainer.checkpoints.buffers import restore_buffers
from mixmae.trainer.checkpoints.files import ReadItem, read_slices
from mixmae.trainer.checkpoints.manifest import DamagedError, Manifest, verify_file
from mixmae.trainer.checkpoints.slices import ModelSlices
from mixmae.trainer.engine.distributed import Ranks, all_gather, from_main


class NoIntactCheckpointError(UsageError):
    """Every checkpoint is damaged: the storage failed, not the user."""

    exit_code = 1


@dataclass(frozen=True)
class Resumed:
    """What a run resumed from.

    Attributes:
        notes: why it is not the checkpoint that was expected, a line for each reason.
    """

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...]


def resume(engine: Any, run_dir: Path, ranks: Ranks) -> Resumed | None:
    """Loads the newest intact checkpoint into the engine; None in a run directory that has none. All ranks call it.

    Raises:
        NoIntactCheckpointError: there are, or were, checkpoints, but none is intact.
    """
    found = _newest_intact(run_dir, ranks)
    if found is not None:
        _load(engine, found.folder, found.manifest, ranks)
    return found


def _newest_intact(run_dir: Path, ranks: Ranks) -> Resumed | None:
    found = checkpoint_history(run_dir), _lost_pointer(run_dir), layout.lost(run_dir)
    candidates, notes, lost = from_main(found, tuple[list[Path], list[str], list[str]])
    for folder in candidates:
        manifest = _verified(folder, ranks, notes)
        if manifest is not None:
            if notes and ranks.is_main:
                layout.point_to(folder)
            return Resumed(folder, manifest, tuple(notes))
    if not candidates and not lost:
        return None
    raise NoIntactCheckpointError(
        f"no checkpoint in {run_dir / CHECKPOINTS} is intact: {'; '.join(notes) if candidates else _gone(lost)}; "
        "restore one from a copy, or name another run_dir to start from the beginning"
    )


def _gone(lost: list[str]) -> str:
    """Of checkpoints that are gone, or were set aside by an earlier start."""
    return f"there are only {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}"


def _verified(folder: Path, ranks: Ranks, notes: list[str]) -> Manifest | None:
    """The checkpoint's manifest if all its files are as they were written; each rank reads a share of them."""
    manifest, fault = None, None
    try:
        manifest = Manifest.read(folder)
        for name in sorted(manifest.files)[ranks.rank :: ranks.world_size]:
            verify_file(folder / name, manifest.files[name])
    except DamagedError as error:
        fault = str(error)
    faults = all_gather(fault, str | None)
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
    return [f"{CHECKPOINTS}/{NEWEST} names no checkpoint that exists, the last one was taken"]


def _load(engine: Any, folder: Path, manifest: Manifest, ranks: Ranks) -> None:
    slices = ModelSlices(engine)
    assert slices.shapes == dict(manifest.shapes), "the recipe was compared before; it makes the shapes"
    slices.begin_load(manifest.optimizer_states, manifest.optimizer_scalars)
    items = [ReadItem(kind, part.name, part.start, to) for part, kind, to in slices.to_read(manifest.optimizer_states)]
    read_slices(items, manifest.paths(folder, ranks.rank))
    restore_buffers(engine.module, manifest.paths(folder), ranks.rank, ranks.world_size)
    slices.end_load()
    engine.global_steps = manifest.step
    engine.global_samples = manifest.state["samples"]
    engine.skipped_steps = manifest.state["skipped"]
    dist.barrier()
