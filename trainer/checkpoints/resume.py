"""Resume from the newest intact checkpoint, at any world size and ZeRO stage."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import CHECKPOINTS, checkpoint_history
from mixmae.trainer.checkpoints import layout
from mixmae.trainer.checkpoints.buffers import restore_buffers
from mixmae.trainer.checkpoints.files import ReadItem, read_slices
from mixmae.trainer.checkpoints.manifest import DamagedError, Manifest, verify_file
from mixmae.trainer.checkpoints.slices import ModelSlices
from mixmae.trainer.engine.distributed import Ranks, all_gather, from_main
from mixmae.trainer.engine.ema import Ema


class NoIntactCheckpointError(UsageError):
    """Every checkpoint is damaged. A failure of the storage and not a usage error, so the exit code is 1."""

    exit_code = 1


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run resumed from.

    Attributes:
        notes: why newer checkpoints were not used, one line each.
    """

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...]


def resume(engine: Any, run_dir: Path, ranks: Ranks, ema: Ema | None = None) -> Resumed | None:
    """Loads the newest intact checkpoint into the engine; returns None in a run directory without any. Collective.

    Raises:
        NoIntactCheckpointError: there are or were checkpoints, but none is intact.
    """
    found = _newest_intact(run_dir, ranks)
    if found is not None:
        _load(engine, found.folder, found.manifest, ranks, ema)
    return found


def stored_state(run_dir: Path) -> dict[str, Any] | None:
    """The training counters of the newest checkpoint that can be read, before any weights are; None without one."""
    for folder in checkpoint_history(run_dir):
        with suppress(DamagedError):
            return dict(Manifest.read(folder).state)
    return None


def _newest_intact(run_dir: Path, ranks: Ranks) -> Resumed | None:
    found = checkpoint_history(run_dir), layout.inconsistencies(run_dir), layout.remnants(run_dir)
    candidates, notes, remnants = from_main(found, tuple[list[Path], list[str], list[str]])
    for folder in candidates:
        manifest = _verified(folder, ranks, notes)
        if manifest is not None:
            if notes and ranks.is_main:
                layout.set_newest(folder)
            return Resumed(folder, manifest, tuple(notes))
    if not candidates and not remnants:
        return None
    raise NoIntactCheckpointError(
        f"no checkpoint in {run_dir / CHECKPOINTS} is intact: "
        f"{'; '.join(notes) if candidates else _describe(remnants)}; "
        "restore one from a copy, or name another run_dir to start from the beginning"
    )


def _describe(remnants: list[str]) -> str:
    return f"found only {', '.join(remnants[:3])}{', ...' if len(remnants) > 3 else ''}"


def _verified(folder: Path, ranks: Ranks, notes: list[str]) -> Manifest | None:
    """The checkpoint's manifest if all files match their checksums, else None; each rank verifies a share of them."""
    manifest, problem = None, None
    try:
        manifest = Manifest.read(folder)
        for name in sorted(manifest.files)[ranks.rank :: ranks.world_size]:
            verify_file(folder / name, manifest.files[name])
    except DamagedError as error:
        problem = str(error)
    problems = all_gather(problem, str | None)
    first = next((problem for problem in problems if problem is not None), None)
    if first is None:
        return manifest
    if ranks.is_main:
        layout.quarantine(folder)
    notes.append(f"{folder.name} is damaged and was quarantined: {first}")
    return None


def _load(engine: Any, folder: Path, manifest: Manifest, ranks: Ranks, ema: Ema | None) -> None:
    slices = ModelSlices(engine)
    names = {**slices.shapes, **manifest.shapes}
    if wrong := [name for name in names if slices.shapes.get(name) != manifest.shapes.get(name)]:
        raise NoIntactCheckpointError(
            f"{folder} does not hold the weights of the recipe's model: {wrong[0]!r} is missing, foreign or of another "
            "shape; restore it from a copy, or name another run_dir"
        )
    slices.begin_load(manifest.optimizer_states, manifest.optimizer_scalars)
    items = [ReadItem(kind, part.name, part.start, to) for part, kind, to in slices.to_read(manifest.optimizer_states)]
    if ema is not None and manifest.ema:
        items += ema.to_read()
    try:
        read_slices(items, manifest.paths(folder, ranks.rank))
    except DamagedError as error:
        raise NoIntactCheckpointError(f"{folder} is damaged: {error}; restore it from a copy") from error
    if ema is not None and not manifest.ema:  # a run that goes on with an average
        ema.restart()
    restore_buffers(engine.module, manifest.paths(folder), ranks.rank, ranks.world_size)
    slices.end_load()
    engine.global_steps = manifest.step
    engine.global_samples = manifest.state["samples"]
    engine.skipped_steps = manifest.state["skipped"]
    dist.barrier()
