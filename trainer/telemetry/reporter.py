"""What a run says of itself: events, TensorBoard, and a progress bar on a terminal or plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mixmae.base.run_directory import EVENTS, PICTURES, TENSORBOARD
from mixmae.trainer.run.run_directory import Events
from mixmae.trainer.telemetry.wandb_tracker import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


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
        self.total_steps = total_steps
        self.tracker = tracker
        self.events = Events(run_dir)
        self.board = Board(run_dir / TENSORBOARD, first_step)
        self.bar: Any = None
        self._with_gaps: set[str] = set()
        self._failed = False
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def scalars(self, step: int, samples: int, values: dict[str, float]) -> None:
        """One logged step, up to which so many samples were seen."""
        curves = [(f"train/{name}", value) for name, value in values.items()]

        def add(writer: "SummaryWriter") -> None:
            for name, value in curves:
                writer.add_scalar(name, value, step)

        with self._recording(EVENTS):
            self.events.write("step", step=step, **values)
        with self._recording(TENSORBOARD):
            self.board.write(add)
        if self.tracker is not None:
            self.tracker.scalars(samples, curves)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_second=f"{values['images_per_second']:.0f}")
        else:
            shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"step {step}/{self.total_steps} {shown}", flush=True)

    def event(self, event: str, message: str, **fields: Any) -> None:
        with self._recording(EVENTS):
            self.events.write(event, message=message, **fields)
        self._failed = self._failed or event == "failed"
        self._say(message)

    def picture(self, step: int, image: Image.Image) -> None:
        with self._recording(PICTURES):
            folder = self.run_dir / PICTURES
            folder.mkdir(exist_ok=True)
            image.save(folder / f"step-{step:08d}.png")
            self.events.write("picture", step=step, file=f"{PICTURES}/step-{step:08d}.png")
        with self._recording(TENSORBOARD):
            self.board.write(lambda it: it.add_image("reconstructions", np.asarray(image), step, dataformats="HWC"))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        with self._recording(TENSORBOARD):
            self.board.close()
        if self.tracker is not None:
            self.tracker.close(clean=not self._failed)
        self.events.close()

    @contextmanager
    def _recording(self, what: str) -> Iterator[None]:
        """Where a part of the record is written; that it cannot be is told once."""
        try:
            yield
        except OSError as error:
            if what not in self._with_gaps:
                self._with_gaps.add(what)
                self._say(f"{self.run_dir / what} cannot be written and has a gap here ({error}); training goes on")

    def _say(self, message: str) -> None:
        tqdm.write(message) if self.bar is not None else print(message, flush=True)


class NullReporter:
    """On all ranks but the main one."""

    def step(self, step: int) -> None: ...

    def scalars(self, step: int, samples: int, values: dict[str, float]) -> None: ...

    def event(self, event: str, message: str, **fields: Any) -> None: ...

    def picture(self, step: int, image: Image.Image) -> None: ...

    def close(self) -> None: ...
