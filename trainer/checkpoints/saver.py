"""Asynchronous checkpointing: a step blocks for the copy to host memory, a background thread writes and publishes it.

With `checkpoint.asynchronous: false` training blocks until the checkpoint is written, and no staging memory is used.
"""

import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mixmae.base.files import sync
from mixmae.base.run_directory import CHECKPOINTS, checkpoint_name
from mixmae.trainer.checkpoints import layout, retention
from mixmae.trainer.checkpoints.buffers import buffers_to_write
from mixmae.trainer.checkpoints.claim import Claim, SupersededError
from mixmae.trainer.checkpoints.files import file_name, write
from mixmae.trainer.checkpoints.host_memory import HostMemory
from mixmae.trainer.checkpoints.manifest import FileRecord, Manifest, Progress
from mixmae.trainer.checkpoints.slices import ModelSlices
from mixmae.trainer.engine.distributed import Ranks, all_gather, background_group, from_main
from mixmae.trainer.engine.ema import Ema
from mixmae.trainer.recipe.schema import Recipe


@dataclass(frozen=True)
class Saved:
    """The outcome of a save.

    Attributes:
        folder: the checkpoint; None if the save failed.
        stall: seconds that training was blocked.
        seconds: from the start of the save until it was complete.
        error: why the save failed, with the rank; None if it succeeded.
        prune_error: why an expired checkpoint could not be deleted; None if all were.
    """

    step: int
    folder: Path | None = None
    bytes: int = 0
    stall: float = 0.0
    seconds: float = 0.0
    error: str | None = None
    prune_error: str | None = None


ManifestOf = Callable[[Mapping[str, FileRecord]], Manifest]
"""Makes the manifest of a save from its files' sizes and checksums."""


class Saver:
    """Writes an engine's checkpoints from all ranks. Construction is collective.

    Args:
        recipe: the run's recipe, stored in the manifests.
        versions: versions of packages, stored in the manifests.
        begun: the step of the checkpoint that the run resumed from.
        ema: is saved too.

    Attributes:
        begun: the step of the last save that was begun, or that the run resumed from.
        error: why the last save failed, None if it succeeded; on the main rank.
        failures: number of consecutive failed saves; on the main rank.
        superseded: whether a later start owns the run directory; on the main rank.
    """

    def __init__(
        self,
        engine: Any,
        recipe: Recipe,
        versions: Mapping[str, str],
        ranks: Ranks,
        begun: int | None = None,
        ema: Ema | None = None,
    ) -> None:
        self._engine, self._recipe, self._versions, self._ranks, self._ema = engine, recipe, versions, ranks, ema
        self._run_dir = recipe.run_dir
        self.begun = begun
        self.error: str | None = None
        self.failures = 0
        self.superseded = False
        self._memory = HostMemory()
        self._group = background_group()
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        claim = from_main(Claim.take(self._run_dir) if ranks.is_main else None, Claim | None)
        assert claim is not None
        self._claim = claim
        if ranks.is_main:
            for leftover in layout.leftovers(self._run_dir):
                shutil.rmtree(leftover, ignore_errors=True)  # on NFS a file that is open elsewhere stays
        if recipe.checkpoint.asynchronous:  # allocates staging memory during the first steps
            tensors = self._tensors(ModelSlices(engine))
            self._begin(lambda: self._memory.reserve(tensors))

    def save(self, progress: Progress) -> None:
        """Starts a save of the engine's current state; returns after the copy if asynchronous, else when it is written.

        Collective. Waits for the previous save first.
        """
        started = time.perf_counter()
        self.wait()
        self.begun = progress.step
        slices = ModelSlices(self._engine)
        tensors = self._tensors(slices)
        manifest_of = self._manifest_of(progress, slices)
        if self._recipe.checkpoint.asynchronous:
            copies = self._memory.copy(tensors)
            stall = time.perf_counter() - started
            self._begin(lambda: self._write(copies, progress.step, manifest_of, started, stall))
        else:
            self._write(tensors, progress.step, manifest_of, started)

    def _tensors(self, slices: ModelSlices) -> dict[str, Tensor]:
        """The tensors that this rank saves, by decreasing element size."""
        averages = {} if self._ema is None else self._ema.to_write()
        tensors = slices.to_write() | averages | buffers_to_write(self._engine.module)
        return dict(sorted(tensors.items(), key=lambda entry: -entry[1].element_size()))

    def _manifest_of(self, progress: Progress, slices: ModelSlices) -> ManifestOf:
        """Captures the engine's state now: training continues before the files are written."""
        of_files = partial(
            Manifest,
            **vars(progress),
            world_size=self._ranks.world_size,
            zero_stage=self._recipe.train.stage,
            recipe=self._recipe.shown(),
            versions=self._versions,
            shapes=slices.shapes,
            frozen=slices.frozen,
            optimizer_states=slices.optimizer_states,
            optimizer_scalars=slices.optimizer_scalars,
            ema=self._ema is not None,
        )
        return lambda files: of_files(files=files)

    def _begin(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        """A thread's end must not pass for a save that succeeded."""
        try:
            work()
        except Exception as error:
            self.error = _describe(error, self._ranks.rank, self._run_dir / CHECKPOINTS)
            self.failures += 1
            self._saved = Saved(self.begun or 0, error=self.error)

    def poll(self) -> Saved | None:
        """The outcome of a save that ended since the last call; on the main rank."""
        saved, self._saved = self._saved, None
        return saved

    def is_writing(self) -> bool:
        """Whether the background thread is writing a save, or allocating staging memory."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Waits for the background thread, up to `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _write(
        self,
        tensors: Mapping[str, Tensor],
        step: int,
        manifest_of: ManifestOf,
        started: float,
        stall: float | None = None,
    ) -> None:
        """Writes and publishes; `stall` is None if training is blocked meanwhile."""
        folder = self._run_dir / CHECKPOINTS / layout.partial_name_of(step, self._claim.token)
        own: FileRecord | str
        try:
            own = self._write_own(folder, tensors)
        except Exception as error:  # any error: the other ranks wait in all_gather
            own = _describe(error, self._ranks.rank, folder / file_name(self._ranks.rank))
        parts = all_gather(own, FileRecord | str, self._group)
        if self._ranks.is_main:
            saved = self._publish(folder, step, manifest_of, parts)
            self.error = saved.error
            self.failures = self.failures + 1 if saved.error else 0
            seconds = time.perf_counter() - started
            self._saved = replace(saved, seconds=seconds, stall=seconds if stall is None else stall)

    def _write_own(self, folder: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
        folder.mkdir(parents=True, exist_ok=True)
        record = write(folder / file_name(self._ranks.rank), tensors)
        sync(folder)
        return record

    def _publish(self, written: Path, step: int, manifest_of: ManifestOf, parts: list[FileRecord | str]) -> Saved:
        """Renames the checkpoint to its final name if all ranks wrote their files, else deletes it."""
        saved = Saved(step)
        files = {file_name(rank): part for rank, part in enumerate(parts) if isinstance(part, FileRecord)}
        errors = [part for part in parts if isinstance(part, str)]
        if errors:
            shutil.rmtree(written, ignore_errors=True)
            return replace(saved, error="; ".join(errors[:3]))
        try:
            manifest = manifest_of(files)
            manifest.write(written)
            self._claim.require(self._run_dir)
            folder = _rename(written, step)
            layout.set_newest(folder)
        except SupersededError as error:
            self.superseded = True
            shutil.rmtree(written, ignore_errors=True)
            return replace(saved, error=str(error))
        except Exception as error:  # any error: the save must not be reported as successful
            shutil.rmtree(written, ignore_errors=True)
            return replace(saved, error=_describe(error, self._ranks.rank, written))
        return replace(saved, folder=folder, bytes=manifest.bytes, prune_error=self._prune(folder))

    def _prune(self, newest: Path) -> str | None:
        """Deletes expired checkpoints; returns why that failed, which does not fail the save."""
        try:
            retention.prune(self._run_dir, newest, self._recipe.checkpoint)
        except OSError as error:
            return f"{error.strerror or error} ({error.filename})"
        except Exception as error:  # whatever it is, the save itself has succeeded
            return _describe(error, self._ranks.rank, newest)
        return None


def _describe(error: Exception, rank: int, path: Path) -> str:
    if isinstance(error, OSError):
        return f"rank {rank}: {error.strerror or error} ({error.filename or path})"
    traceback.print_exception(error)
    return f"rank {rank}: {error!r} ({path})"


def _rename(written: Path, step: int) -> Path:
    folder = written.with_name(checkpoint_name(step))
    abandoned = written.with_name(f"{written.name}-before")
    if folder.exists():  # from a history that was abandoned for an earlier checkpoint
        folder.rename(abandoned)
    sync(written)
    written.rename(folder)
    sync(folder.parent)
    sync(folder.parent.parent)  # the first save created the checkpoints directory
    shutil.rmtree(abandoned, ignore_errors=True)
    return folder
