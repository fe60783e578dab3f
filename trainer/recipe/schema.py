"""The recipe: all of a run in one frozen value.

`sections` has its parts with every default; `loading` reads recipes. No torch: login nodes read them too.
"""

from math import prod
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, model_validator

from mixmae.base.errors import UsageError
from mixmae.base.image_size import both_sides
from mixmae.base.redaction import redact_all
from mixmae.trainer.recipe.sections.checkpoint import Checkpoint
from mixmae.trainer.recipe.sections.components import EncoderSection, MethodSection
from mixmae.trainer.recipe.sections.data import Data
from mixmae.trainer.recipe.sections.detection import Detection
from mixmae.trainer.recipe.sections.evaluate import Evaluate
from mixmae.trainer.recipe.sections.labelled import Augment, Classification, Linear
from mixmae.trainer.recipe.sections.launch import Launch
from mixmae.trainer.recipe.sections.log import Log
from mixmae.trainer.recipe.sections.monitoring import Monitoring
from mixmae.trainer.recipe.sections.optim import Optim
from mixmae.trainer.recipe.sections.section import Section
from mixmae.trainer.recipe.sections.segmentation import Segmentation
from mixmae.trainer.recipe.sections.train import Train

_BYTES = {"uint8": 1, "uint16": 2, "float32": 4}
_STREAMS = 512
"""The most that a recipe which does not say how many gets."""
_SHOWN = 20
"""World sizes that a message proposes."""


class Recipe(Section):
    run_dir: Path = Path("runs/mixmae")
    seed: int = Field(0, ge=0, lt=2**63)
    task: str = "pretrain"
    plugins: tuple[str, ...] = ()
    """Modules that register tasks, methods and encoders of your own; imported before the recipe is checked."""
    encoder: EncoderSection = EncoderSection()
    method: MethodSection = MethodSection()
    classification: Classification = Classification()
    linear: Linear = Linear()
    detection: Detection = Detection()
    segmentation: Segmentation = Segmentation()
    data: Data = Data()
    augment: Augment = Augment()
    train: Train = Train()
    optim: Optim = Optim()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    monitoring: Monitoring = Monitoring()
    launch: Launch = Launch()

    @model_validator(mode="after")
    def _streams_share_the_global_batch(self) -> Self:
        if self.train.global_batch % self.streams:
            raise ValueError(
                f"train.global_batch={self.train.global_batch} does not divide by data.streams={self.streams}: each "
                "batch takes the same number of samples from each stream"
            )
        return self

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per optimizer step and rank.

        Raises:
            UsageError: the global batch does not divide by micro_batch * world_size.
        """
        at_once = self.train.micro_batch * world_size
        if self.train.global_batch % at_once:
            largest = min(self.train.micro_batch, self.train.global_batch // world_size)
            fits = (m for m in range(largest, 0, -1) if self.train.global_batch % (m * world_size) == 0)
            fit = next(fits, None)
            change = f"train.micro_batch={fit} would" if fit else f"train.global_batch={at_once} would"
            raise UsageError(
                f"train.global_batch={self.train.global_batch} does not divide by train.micro_batch="
                f"{self.train.micro_batch} on {world_size} ranks; {change}"
            )
        return self.train.global_batch // at_once

    @property
    def batch_bytes_ahead(self) -> int:
        """Bytes of shared memory for the images that a rank's data workers hold ready."""
        return self.data.num_workers * self.data.prefetch_factor * self.train.micro_batch * self.image_bytes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the model is given."""
        return (self.data.channels, *both_sides(self.encoder.img_size))

    @property
    def image_bytes(self) -> int:
        """Of one image as data workers hand it over."""
        return prod(self.image_shape) * _BYTES[self.data.dtype]

    @property
    def streams(self) -> int:
        """Canonical streams of the data's order."""
        if self.data.streams is not None:
            return self.data.streams
        divisors = [n for n in range(1, _STREAMS + 1) if self.train.global_batch % n == 0]
        return max(divisors, key=lambda n: (n & -n, n))  # clusters come in powers of two

    def streams_of(self, rank: int, world_size: int) -> range:
        """The streams that a rank serves.

        Raises:
            UsageError: the streams cannot be split evenly among so many ranks.
        """
        if self.streams % world_size:
            allowed = [str(n) for n in range(1, self.streams + 1) if self.streams % n == 0][:_SHOWN]
            fits = next(n for n in range(world_size, 0, -1) if self.streams % n == 0)
            raise UsageError(
                f"{world_size} ranks cannot share data.streams={self.streams} in whole numbers; use "
                f"{', '.join(allowed)} ranks "
                f"({fits} is the nearest below), or, in a new run, data.streams set to a multiple of {world_size} that "
                f"divides train.global_batch={self.train.global_batch}"
            )
        share = self.streams // world_size
        return range(rank * share, (rank + 1) * share)

    def to_yaml(self) -> str:
        """All of it, as ranks read it; credentials in URLs included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def shown(self) -> dict[str, Any]:
        """Nested values without credentials, for records that others may read."""
        values: dict[str, Any] = redact_all(self.model_dump(mode="json"))
        return values
