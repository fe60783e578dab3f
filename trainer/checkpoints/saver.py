"""Saving while training goes on: the step stops for a copy to host memory, a thread writes and publishes it.

Where saving is not asynchronous, training stands until all is written, and no host memory is taken.
"""

import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mixmae.base.files import sync
from mixmae.base.run_directory import CHECKPOINTS, checkpoint_name
from mixmae.trainer.checkpoints import layout, retention
from mixmae.trainer.checkpoints.claim import Claim, SupersededError
from mixmae.trainer.checkpoints.files import HostMemory, contents, file_name, write
from mixmae.trainer.checkpoints.layout import Manifest, Written
from mixmae.trainer.checkpoints.pieces import Pieces
from mixmae.trainer.engine.distributed import Ranks, background_group, from_main
from mixmae.trainer.recipe.schema import Checkpoint


@dataclass(frozen=True)
class Saved:
    """What became of a save.

    Attributes:
        folder: the checkpoint; None if it could not be saved.
        stall: seconds that training stood still for it.
        seconds: from the start until it was complete.
        error: why it could not be saved, naming the rank; None if it was.
        kept: why one that is no longer wanted could not be removed; None if all were.
    """

    step: int
    folder: Path | None = None
    bytes: int = 0
    stall: float = 0.0
    seconds: float = 0.0
    error: str | None = None
    kept: str | None = None


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
        self._memory = HostMemory()
        self._group = background_group()
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        claim = from_main(Claim.take(run_dir) if ranks.is_main else None)
        assert claim is not None
        self._claim = claim
        if ranks.is_main:
            for partial in layout.leftovers(run_dir):
                shutil.rmtree(partial, ignore_errors=True)  # on NFS a file that is still read elsewhere stays
        if settings.asynchronous:  # memory for the first save is made ready beside the first steps
            tensors = self._tensors(Pieces(engine))
            self._begin(lambda: self._memory.reserve(tensors))

    def save(self, manifest: Manifest) -> None:
        """Begins a save of what the engine holds now; where it is not asynchronous, also ends it.

        To be called by all ranks. Waits for the save before, should it still be written.

        Args:
            manifest: what is known of the checkpoint before its files are written.
        """
        started = time.perf_counter()
        self.wait()
        self.begun = manifest.step
        pieces = Pieces(self._engine)
        tensors = self._tensors(pieces)
        manifest = replace(manifest, optimizer_step=pieces.optimizer_step, shapes=pieces.shapes)
        if self._settings.asynchronous:
            copies = self._memory.copy(tensors)
            stall = time.perf_counter() - started
            self._begin(lambda: self._write(copies, manifest, started, stall))
        else:
            self._write(tensors, manifest, started)

    def _tensors(self, pieces: Pieces) -> dict[str, Tensor]:
        """What this rank saves; the model's buffers are the main one's."""
        return contents(pieces, dict(self._engine.module.named_buffers()) if self._ranks.is_main else {})

    def _begin(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> Saved | None:
        """What became of a save that ended since this was last asked; known to the main rank."""
        saved, self._saved = self._saved, None
        return saved

    def is_writing(self) -> bool:
        """Whether a save is still written, or memory for the first one made ready."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when nothing is being written any more, or after so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _write(
        self, tensors: Mapping[str, Tensor], manifest: Manifest, started: float, stall: float | None = None
    ) -> None:
        """Writes and publishes; `stall` is None where training stands until then."""
        partial = self._run_dir / CHECKPOINTS / layout.partial_name_of(manifest.step, self._claim.token)
        own: Written | str
        try:
            own = self._write_own(partial, tensors)
        except Exception as error:  # whatever it is, the others wait to hear of it
            own = _in_words(error, self._ranks.rank, partial / file_name(self._ranks.rank))
        parts: list[Written | str] = [own] * self._ranks.world_size
        dist.all_gather_object(parts, own, group=self._group)
        if self._ranks.is_main:
            saved = self._publish(partial, manifest, parts)
            self.error = saved.error
            self.failures = self.failures + 1 if saved.error else 0
            seconds = time.perf_counter() - started
            self._saved = replace(saved, seconds=seconds, stall=seconds if stall is None else stall)

    def _write_own(self, partial: Path, tensors: Mapping[str, Tensor]) -> Written:
        partial.mkdir(parents=True, exist_ok=True)
        written = write(partial / file_name(self._ranks.rank), tensors)
        sync(partial)
        return written

    def _publish(self, partial: Path, manifest: Manifest, parts: list[Written | str]) -> Saved:
        """Gives the checkpoint its name if all ranks wrote theirs, else removes what they did write."""
        saved = Saved(manifest.step)
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
        except SupersededError as error:
            self.superseded = True
            shutil.rmtree(partial, ignore_errors=True)
            return replace(saved, error=str(error))
        except Exception as error:  # whatever it is, nobody must take this save for one that succeeded
            shutil.rmtree(partial, ignore_errors=True)
            return replace(saved, error=_in_words(error, self._ranks.rank, partial))
        return replace(saved, folder=folder, bytes=manifest.bytes, kept=self._prune(folder))

    def _prune(self, newest: Path) -> str | None:
        """Removes what is not kept any more; why it could not, which makes the newest no worse."""
        try:
            retention.prune(self._run_dir, newest, self._settings)
        except OSError as error:
            return f"{error.strerror or error} ({error.filename})"
        return None


def _in_words(error: Exception, rank: int, place: Path) -> str:
    if isinstance(error, OSError):
        return f"rank {rank}: {error.strerror or error} ({error.filename or place})"
    traceback.print_exception(error)
    return f"rank {rank}: {error!r} ({place})"


def _rename(partial: Path, step: int) -> Path:
    folder = partial.with_name(checkpoint_name(step))
    given_up = partial.with_name(f"{partial.name}-before")
    if folder.exists():  # of a history that was left for an earlier checkpoint
        folder.rename(given_up)
    sync(partial)
    partial.rename(folder)
    sync(folder.parent)
    sync(folder.parent.parent)  # the first save made the folder of checkpoints
    shutil.rmtree(given_up, ignore_errors=True)
    return folder
