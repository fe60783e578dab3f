"""What a run says of itself: events, TensorBoard, and a progress bar on a terminal or plain lines elsewhere."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from trainer.run_dir import Events


class Reporter:
    """The main rank's reporter; `NullReporter` stands on the others."""

    def __init__(self, run_dir: Path, first_step: int, total_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = run_dir
        self.total_steps = total_steps
        self.events = Events(run_dir)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self.bar: Any = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One logged step."""
        self.events.write("step", step=step, **values)
        for name, value in values.items():
            self.board.add_scalar(f"train/{name}", value, step)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_second=f"{values['images_per_second']:.0f}")
        else:
            shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"step {step}/{self.total_steps} {shown}", flush=True)

    def event(self, event: str, message: str, **fields: Any) -> None:
        self.events.write(event, message=message, **fields)
        tqdm.write(message) if self.bar is not None else print(message, flush=True)

    def picture(self, step: int, image: Image.Image) -> None:
        folder = self.run_dir / "pictures"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"step-{step:08d}.png")
        self.board.add_image("reconstructions", np.asarray(image), step, dataformats="HWC")
        self.events.write("picture", step=step, file=f"pictures/step-{step:08d}.png")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.board.close()
        self.events.close()


class NullReporter:
    """On all ranks but the main one."""

    def step(self, step: int) -> None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def event(self, event: str, message: str, **fields: Any) -> None: ...

    def picture(self, step: int, image: Image.Image) -> None: ...

    def close(self) -> None: ...
