"""What a task is: the part of a run that says what is trained, on what, and how it is judged.

To add one, write a file beside this one with a subclass of `Task`, and put `register_task` before it; a plugin of a
user's own does the same in a module that the recipe names under `plugins:`. A task holds no state of the run: what it
returns is a function of the recipe and of its arguments, so that a resumed run goes on bit for bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
from mixmae.models.methods.contract import Column
from mixmae.trainer.data.batch_reader import Batch
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.integrity import require_pixels
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.transform import RandomResizedCropFlip, SampleTransform
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.optimizer import OptimizerChoice, adamw
from mixmae.trainer.evaluation.coco_results import ResultFile
from mixmae.trainer.evaluation.held_out import require_readable
from mixmae.trainer.recipe.schema import Recipe

SHOWN_SCORE = 0.5
"""The score from which on an object that was found is shown, where nobody says another one."""


class Prediction(NamedTuple):
    """What a module makes of one image, for `mixmae predict`."""

    picture: Image.Image
    """The image with it drawn in."""
    facts: dict[str, Any]
    """As JSON holds them."""
    lines: list[str]
    """In words."""


class Task(ABC):
    """One object for a run, made from its recipe on every rank.

    Attributes:
        recipe: with the keys of its encoder and method checked, and every default filled in.
    """

    unused_sections: ClassVar[tuple[str, ...]] = ()
    """Of the recipe, which say nothing to this task, and which a recipe of it must leave out."""

    exports_whole: ClassVar[bool] = False
    """Whether `mixmae export` writes the whole module (`task_directory`), and not its encoder for timm."""

    finds_objects: ClassVar[bool] = False
    """Whether there is `evaluate_to`."""

    def __init__(self, recipe: Recipe) -> None:
        self._refuse_unused(recipe)
        self.recipe = self.resolve(recipe)
        if recipe.evaluate.probe is not None and type(self).probe is Task.probe:
            raise UsageError(
                f"evaluate.probe={recipe.evaluate.probe.shards}: task={recipe.task} does not probe its encoder; remove "
                "the key, or set evaluate.shards"
            )

    def _refuse_unused(self, recipe: Recipe) -> None:
        for section in self.unused_sections:
            if (given := getattr(recipe, section)) != type(given)():
                raise UsageError(f"task={recipe.task} has no use for the section {section!r}; leave it out")

    def resolve(self, recipe: Recipe) -> Recipe:
        """The recipe with every default of its components.

        Raises:
            UsageError: a key, or a combination, that this task or its components do not have.
        """
        return recipe

    @abstractmethod
    def build(self) -> Trainable:
        """The module that is trained, with random weights that are a function of the seed; on the default device.

        Raises:
            UsageError: sizes that do not fit each other.
        """

    def initialise(self, module: Trainable) -> None:  # noqa: B027  (most start from random weights)
        """Loads the weights that the recipe starts from; not called where a checkpoint is resumed.

        Raises:
            UsageError: no such weights, or they do not fit.
        """

    def check_data(self, index: ShardIndex) -> None:
        """Looks at whether `data.shards` and the shards of evaluations hold what the task needs.

        Raises:
            UsageError: what is missing.
        """
        self.check_shards(index, "data.shards")
        if self.recipe.evaluate.shards is not None:
            held_out = self.open_shards(self.recipe.evaluate.shards)
            self.check_held_out(held_out, "evaluate.shards")
            held_out.store.close()

    def check_shards(self, index: ShardIndex, key: str) -> None:  # noqa: B027  (images are enough for some)
        """Looks at whether shards, to train or to be evaluated on, hold what the task needs, such as labels.

        Args:
            key: by which the user named them, for messages: `evaluate.shards`.

        Raises:
            UsageError: what is missing.
        """

    def check_held_out(self, index: ShardIndex, key: str) -> None:
        """Looks at whether `evaluate` can tell a figure of all these shards; arguments and errors as `check_shards`."""
        require_readable(index, key)
        self.check_shards(index, key)

    def open_shards(self, shards: str) -> ShardIndex:
        """The index of shards beside `data.shards`, such as held-out ones, which are read as those are.

        Raises:
            UsageError: as `open_index`.
        """
        index = open_index(shards, self.recipe.data.network, self.recipe.data.cache)
        require_pixels(index, self.recipe.data)
        return index

    def transform(self, index: ShardIndex) -> SampleTransform:
        """What data workers make of a sample of `data.shards`."""
        return RandomResizedCropFlip(self.recipe.encoder.img_size, self.recipe.data)

    def prepare(  # noqa: B027  (most have nothing to compute)
        self, module: Trainable, index: ShardIndex, ranks: Ranks, beat: Callable[[], None]
    ) -> None:
        """Computes what steps need beside the module, before the first one; all ranks call it together.

        Args:
            module: on its device, with the weights that the run goes on from.
            beat: to be called every few seconds, so that the rank is not taken for stuck.
        """

    def optimizer(self) -> OptimizerChoice:
        """The optimizer; AdamW with the recipe's settings unless a task takes another."""
        return adamw(self.recipe.optim)

    def lr_scale_of(self, module: Trainable) -> Callable[[str], float] | None:
        """Parameters' learning rates over the schedule's, by name; None for 1.0 everywhere."""
        return None

    def require_batch(self, module: Trainable) -> None:
        """Raises UsageError if a micro-batch has fewer images than the module needs."""
        given = self.recipe.train.micro_batch
        if given < module.min_batch:
            raise UsageError(
                f"train.micro_batch={given} is less than the {module.min_batch} images that are needed at once "
                f"({self.describe()}); raise it to {module.min_batch} or more"
            )

    def check(self) -> None:
        """Everything about the model that can be found out without memory for it.

        Raises:
            UsageError: sizes that do not fit each other, or too small a micro-batch.
        """
        with torch.device("meta"):
            module = self.build()
        self.require_batch(module)

    @abstractmethod
    def inputs(self, module: Trainable, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What the module takes beside the images, on the CPU: targets, and all that is random about a step."""

    def pictures(self, module: Trainable, images: Tensor, inputs: Sequence[Tensor], rows: int) -> list[Column]:
        """What the module makes of some images; no columns, no picture. All ranks call it together."""
        return []

    def evaluate(self, module: Trainable, ranks: Ranks, beat: Callable[[], None]) -> dict[str, float]:
        """Figures of an evaluation, by name (val_loss, top1); none where the recipe asks for none.

        All ranks call it together, with the module in eval mode and without gradients, and get the same figures. They
        become curves, events and gauges, and `checkpoint.best_metric` may name one. A run's numbers do not depend on
        whether it is evaluated: what is random here has generators of its own.

        Args:
            beat: to be called with each batch, so that the rank is not taken for stuck.
        """
        return {}

    def evaluate_to(
        self, file: ResultFile, module: Trainable, ranks: Ranks, beat: Callable[[], None]
    ) -> dict[str, float]:
        """`evaluate`, of which the main rank writes every object that is found, for tasks that find some."""
        raise NotImplementedError(f"task={self.recipe.task}")

    def probe(self, module: Trainable, ranks: Ranks, beat: Callable[[], None]) -> dict[str, float]:
        """Figures of the encoder's frozen features on `evaluate.probe.shards`; called as `evaluate` is."""
        return {}

    def predict(self, module: Trainable, image: Tensor, device: torch.device, min_score: float) -> Prediction:
        """What the module makes of an image of any size, for tasks that export the whole of it.

        Args:
            module: in eval mode, on the device.
            image: uint8 [3, H, W], upright, on the CPU.
            min_score: of objects that are found; the others are left out.
        """
        raise NotImplementedError(f"task={self.recipe.task}")

    @abstractmethod
    def example_inputs(self, module: Trainable, batch: int) -> tuple[Tensor, ...]:
        """Inputs of a step of `batch` images, for plans and benchmarks."""

    @abstractmethod
    def describe(self) -> str:
        """The task in a few words, such as its encoder and method, for logs and plans."""
