"""Saving while training goes on: the step stops for a copy to host memory, a thread writes and publishes it."""

import shutil
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.checkpoints import layout, retention
from trainer.checkpoints.claim import Claim, SupersededError
from trainer.checkpoints.files import Snapshot, file_name
from trainer.checkpoints.layout import Manifest, Written
from trainer.checkpoints.pieces import Pieces
from trainer.config import Checkpoint
from trainer.distributed import Ranks, background_group, from_main


@dataclass(frozen=True)
class Saved:
    """What became of a save.

    Attributes:
        folder: the checkpoint; None if it could not be saved.
        stall: seconds that training stood still for it.
        seconds: from the start until it was complete.
        error: why it could not be saved, naming the rank; None if it was.
    """

    step: int
    folder: Path | None
    bytes: int
    stall: float
    seconds: float
    error: str | None = None


class Saver:
    """Writes an engine's checkpoints from all ranks; to be made by all of them together.

    Attributes:
        begun: the step of the last save that was begun, or that the run continues from.
        error: why the last save failed, None if it did not; known to the main rank.
        failures: saves in a row that failed; known to the main rank.
        superseded: whether a later start has the run directory; known to the main rank.
    """

    def __init__(
        self, engine: Any, run_dir: Path, settings: Checkpoint, ranks: Ranks, begun: int | None = None
    ) -> None:
        self._engine, self._run_dir, self._settings, self._ranks = engine, run_dir, settings, ranks
        self.begun = begun
        self.error: str | None = None
        self.failures = 0
        self.superseded = False
        self._buffers = dict(engine.module.named_buffers()) if ranks.is_main else {}
        self._snapshot = Snapshot(Pieces(engine), self._buffers)
        self._group = background_group()
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        claim = from_main(Claim.take(run_dir) if ranks.is_main else None)
        assert claim is not None
        self._claim = claim
        if ranks.is_main:
            for partial in layout.leftovers(run_dir):
                shutil.rmtree(partial)

    def save(self, manifest: Manifest) -> None:
        """Begins a save of what the engine holds now; to be called by all ranks.

        Waits for the save before, should it still be written.

        Args:
            manifest: what is known of the checkpoint before its files are written.
        """
        started = time.perf_counter()
        self.wait()
        self.begun = manifest.step
        pieces = Pieces(self._engine)
        self._snapshot.take(pieces, self._buffers)
        manifest = replace(manifest, optimizer_step=pieces.optimizer_step, shapes=pieces.shapes)
        stall = time.perf_counter() - started
        self._thread = threading.Thread(target=self._write, args=(manifest, started, stall), name="checkpoint")
        self._thread.daemon = True
        self._thread.start()

    def poll(self) -> Saved | None:
        """What became of a save that ended since this was last asked; known to the main rank."""
        saved, self._saved = self._saved, None
        return saved

    def is_ready(self) -> bool:
        """Whether the memory was made that a save is copied to."""
        return self._snapshot.is_ready

    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when nothing is being written any more, or after so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _write(self, manifest: Manifest, started: float, stall: float) -> None:
        partial = self._run_dir / layout.FOLDER / layout.partial_name_of(manifest.step, self._claim.token)
        own: Written | str
        try:
            own = self._write_own(partial)
        except OSError as error:
            own = f"rank {self._ranks.rank}: {error.strerror or error} ({partial / file_name(self._ranks.rank)})"
        parts: list[Written | str] = [own] * self._ranks.world_size
        dist.all_gather_object(parts, own, group=self._group)
        if self._ranks.is_main:
            saved = self._publish(partial, manifest, parts, Saved(manifest.step, None, 0, stall, 0.0))
            self.error = saved.error
            self.failures = self.failures + 1 if saved.error else 0
            self._saved = replace(saved, seconds=time.perf_counter() - started)

    def _write_own(self, partial: Path) -> Written:
        partial.mkdir(parents=True, exist_ok=True)
        written = self._snapshot.write(partial / file_name(self._ranks.rank))
        layout.sync(partial)
        return written

    def _publish(self, partial: Path, manifest: Manifest, parts: list[Written | str], saved: Saved) -> Saved:
        """Gives the checkpoint its name if all ranks wrote theirs, else removes what they did write."""
        files = {file_name(rank): part for rank, part in enumerate(parts) if isinstance(part, Written)}
        errors = [part for part in parts if isinstance(part, str)]
        if errors:
            shutil.rmtree(partial, ignore_errors=True)
            return replace(saved, error="; ".join(errors[:3]))
        manifest = replace(manifest, files=files)
        try:
            manifest.write(partial)
            self._claim.require(self._run_dir)
            folder = _rename(partial, manifest.step)
            layout.point_to(folder)
            retention.prune(self._run_dir, folder, self._settings)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            return replace(saved, error=f"rank 0: {error.strerror or error} ({error.filename or partial})")
        except SupersededError as error:
            self.superseded = True
            shutil.rmtree(partial, ignore_errors=True)
            return replace(saved, error=str(error))
        return replace(saved, folder=folder, bytes=manifest.bytes)


def _rename(partial: Path, step: int) -> Path:
    folder = partial.with_name(layout.name_of(step))
    given_up = partial.with_name(f"{partial.name}-before")
    if folder.exists():  # of a history that was left for an earlier checkpoint
        folder.rename(given_up)
    layout.sync(partial)
    partial.rename(folder)
    layout.sync(folder.parent)
    shutil.rmtree(given_up, ignore_errors=True)
    return folder
