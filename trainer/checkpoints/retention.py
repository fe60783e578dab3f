"""Retention of checkpoints: the last `keep`, one every `keep_every`, and the `keep_best` best."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.run_directory import checkpoint_step, complete_checkpoints
from mixmae.trainer.checkpoints import layout
from mixmae.trainer.checkpoints.manifest import DamagedError, Manifest
from mixmae.trainer.recipe.sections.checkpoint import Checkpoint


def prune(run_dir: Path, newest: Path, settings: Checkpoint) -> None:
    """Deletes checkpoints that are not kept, and those of later steps than the newest, whose history was abandoned."""
    found = complete_checkpoints(run_dir)
    past = [checkpoint for checkpoint in found if checkpoint.name <= newest.name]
    keep = kept(past, settings)
    for checkpoint in found:
        if checkpoint not in keep:
            stale = checkpoint.with_name(layout.partial_name_of(checkpoint_step(checkpoint), "removed"))
            checkpoint.rename(stale)  # a partly deleted one must not have the name of a complete one
            shutil.rmtree(stale)


def kept(checkpoints: Sequence[Path], settings: Checkpoint) -> set[Path]:
    """The checkpoints that the recipe keeps, of a history that is sorted oldest first."""
    keep = set(checkpoints[-settings.keep :])
    if settings.keep_every is None and settings.keep_best == 0:
        return keep
    manifests = {checkpoint: manifest for checkpoint in checkpoints if (manifest := _manifest(checkpoint))}
    keep |= set(_best_first(manifests, settings)[: settings.keep_best])
    if settings.keep_every is not None:
        keep |= {path for path, count in _periods(manifests, settings).items() if count}
    return keep


def _best_first(manifests: dict[Path, Manifest], settings: Checkpoint) -> list[Path]:
    """Checkpoints with a value of `best_metric`, best first; ties are sorted oldest first."""
    values = {path: manifest.metric(settings.best_metric) for path, manifest in manifests.items()}
    known = {path: value for path, value in values.items() if value is not None}
    sign = 1 if settings.best_mode == "min" else -1
    return sorted(known, key=lambda path: sign * known[path])


def _periods(manifests: dict[Path, Manifest], settings: Checkpoint) -> dict[Path, int]:
    """Number of multiples of `keep_every` that each checkpoint is the first to reach."""
    every = settings.keep_every
    assert every is not None
    crossed = {}
    before = 0
    for path, manifest in manifests.items():
        done = {"step": manifest.step, "sample": manifest.state["samples"], "epoch": manifest.epoch}[every.unit]
        periods = int(done / every.amount + 1e-9)
        crossed[path] = periods - before
        before = periods
    return crossed


def _manifest(checkpoint: Path) -> Manifest | None:
    try:
        return Manifest.read(checkpoint)
    except DamagedError:  # reported at the next resume
        return None
