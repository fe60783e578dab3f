"""Logs the run on its main rank: events, TensorBoard, Weights & Biases, and a line per logged step."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mixmae.base.run_directory import EVENTS, PICTURES, TENSORBOARD
from mixmae.trainer.telemetry.events import Events
from mixmae.trainer.telemetry.progress import Progress, plain_number
from mixmae.trainer.telemetry.wandb_tracker import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_logger = logging.getLogger(__name__)
_WARNINGS = ("checkpoint_failed", "checkpoint_kept", "data", "fallback", "monitoring", "skipped")
"""Events that are logged as warnings; `failed` is not logged, since the error itself is shown when the run ends."""


class Board:
    """TensorBoard's event file; begun anew after the disk was full, since its writer ends at the first error."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = self._open(purge_step=first_step + 1)

    def write(self, add: Callable[["SummaryWriter"], None]) -> None:
        """Adds something, which a thread of the writer's own puts on disk.

        Raises:
            OSError: something that was added before could not be written.
        """
        self._writer = self._writer or self._open()
        try:
            add(self._writer)
        except OSError:
            self._writer = None
            raise

    def _open(self, purge_step: int | None = None) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=purge_step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Reporter:
    """The main rank's reporter; `NullReporter` stands on the others. A full disk costs the record, not the run."""

    def __init__(self, run_dir: Path, first_step: int, total_steps: int, tracker: Tracker | None = None) -> None:
        self.run_dir = run_dir
        self.tracker = tracker
        self.progress = Progress(total_steps)
        self.events = Events(run_dir)
        self.board = Board(run_dir / TENSORBOARD, first_step)
        self._with_gaps: set[str] = set()
        self._failed = False

    def scalars(self, step: int, samples: int, values: dict[str, float]) -> None:
        """One logged step, up to which so many samples were seen."""
        with self._recording(EVENTS):
            self.events.write("step", step=step, **values)
        self._curves("train", step, samples, values)
        _logger.info(self.progress.line(step, values))

    def evaluation(self, step: int, samples: int, metrics: Mapping[str, float]) -> None:
        """What the task measured at a step."""
        shown = "  ".join(f"{name} {plain_number(name, value)}" for name, value in metrics.items() if "/" not in name)
        self._curves("eval", step, samples, metrics)
        self.event("evaluation", f"evaluation at step {step}  {shown}", step=step, samples=samples, metrics=metrics)

    def event(self, event: str, message: str, **fields: Any) -> None:
        with self._recording(EVENTS):
            self.events.write(event, message=message, **fields)
        if event == "failed":
            self._failed = True
        else:
            _logger.log(logging.WARNING if event in _WARNINGS else logging.INFO, message)

    def picture(self, step: int, image: Image.Image) -> None:
        with self._recording(PICTURES):
            folder = self.run_dir / PICTURES
            folder.mkdir(exist_ok=True)
            image.save(folder / f"step-{step:08d}.png")
            self.events.write("picture", step=step, file=f"{PICTURES}/step-{step:08d}.png")
        with self._recording(TENSORBOARD):
            self.board.write(lambda it: it.add_image("reconstructions", np.asarray(image), step, dataformats="HWC"))

    def close(self) -> None:
        with self._recording(TENSORBOARD):
            self.board.close()
        if self.tracker is not None:
            self.tracker.close(clean=not self._failed)
        self.events.close()

    def _curves(self, group: str, step: int, samples: int, values: Mapping[str, float]) -> None:
        def add(writer: "SummaryWriter") -> None:
            for name, value in curves:
                writer.add_scalar(name, value, step)

        curves = [(f"{group}/{name}", value) for name, value in values.items()]
        with self._recording(TENSORBOARD):
            self.board.write(add)
        if self.tracker is not None:
            self.tracker.scalars(samples, curves)

    @contextmanager
    def _recording(self, what: str) -> Iterator[None]:
        """Where a part of the record is written; that it cannot be is told once."""
        try:
            yield
        except OSError as error:
            if what not in self._with_gaps:
                self._with_gaps.add(what)
                file = self.run_dir / what
                _logger.warning("%s cannot be written and has a gap here (%s); training goes on", file, error)


class NullReporter:
    """On all ranks but the main one."""

    def scalars(self, step: int, samples: int, values: dict[str, float]) -> None: ...

    def evaluation(self, step: int, samples: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, event: str, message: str, **fields: Any) -> None: ...

    def picture(self, step: int, image: Image.Image) -> None: ...

    def close(self) -> None: ...
