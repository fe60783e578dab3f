"""Detection: an encoder under Mask R-CNN learns to find objects, their boxes and masks (COCO's format)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.image_size import both_sides
from mixmae.models.contract import Trainable
from mixmae.models.heads.backbone import Backbone
from mixmae.models.heads.mask_rcnn.detector import MaskRCNN
from mixmae.models.heads.mask_rcnn.targets import pad_objects
from mixmae.models.methods.contract import Column
from mixmae.trainer.data.batch_reader import Batch
from mixmae.trainer.data.dense.held_out import held_out_scenes
from mixmae.trainer.data.dense.jitter import LargeScaleJitterCrop
from mixmae.trainer.data.dense.resizing import fit_into
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.integrity import require_annotations
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.data.transform import SampleTransform
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.layer_decay import lr_scales
from mixmae.trainer.evaluation.average_precision import require_evaluator
from mixmae.trainer.evaluation.coco_results import ResultFile
from mixmae.trainer.evaluation.detection import evaluate_detector, find_in_image
from mixmae.trainer.evaluation.detection_pictures import draw_columns, draw_found
from mixmae.trainer.export.initial_weights import initialise_backbone
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.classes import listed, shards_with_classes
from mixmae.trainer.tasks.contract import Prediction, Task
from mixmae.trainer.tasks.encoder import build_encoder, check_encoder, require_rgb
from mixmae.trainer.tasks.registry import register_task

_SLOTS, _OBJECTS = 100, 8
"""Of an image in plans: more objects than any image of COCO has (93), and masks as an average one."""


@register_task("detect")
class Detect(Task):
    """The recipe's `encoder:` under Mask R-CNN, all of it trained, on shards with objects."""

    unused_sections: ClassVar[tuple[str, ...]] = ("method", "classification", "linear", "augment", "segmentation")
    exports_whole = True
    finds_objects = True

    def resolve(self, recipe: Recipe) -> Recipe:
        check_encoder(recipe)
        require_rgb(recipe)
        if recipe.train.deterministic:
            raise UsageError(
                "train.deterministic=true: on GPUs RoIAlign adds gradients in no fixed order, and torch's way around "
                "that takes terabytes; set it to false"
            )
        return _resolve_classes(recipe)

    @property
    def classes(self) -> tuple[str, ...]:
        names, count = self.recipe.detection.classes, self.recipe.detection.num_classes
        assert count is not None, "resolved"
        return names or tuple(f"class {number}" for number in range(count))

    def build(self) -> MaskRCNN:
        recipe, part = self.recipe, self.recipe.detection
        torch.manual_seed(recipe.seed)
        try:
            backbone = Backbone(build_encoder(recipe))
        except ValueError as error:
            raise UsageError(f"encoder.name={recipe.encoder.name}: {error}") from error
        return MaskRCNN(backbone, len(self.classes), both_sides(recipe.encoder.img_size), part.channels, part.rois)

    def initialise(self, module: Trainable) -> None:
        if self.recipe.encoder.init is not None:
            initialise_backbone(_detector(module).encoder, self.recipe.encoder.init)

    def check_shards(self, index: ShardIndex, key: str) -> None:
        require_annotations(index, "objects", key)
        if index.classes != self.classes:
            raise UsageError(
                f"{key}={index.store.location} has {len(index.classes)} classes ({listed(index.classes)}), and the "
                f"detector {len(self.classes)} ({listed(self.classes)}); build the shards with the same categories"
                + (", or correct detection.classes" if key == "data.shards" else "")
            )

    def check_held_out(self, index: ShardIndex, key: str) -> None:
        require_evaluator()
        super().check_held_out(index, key)

    def transform(self, index: ShardIndex) -> SampleTransform:
        return LargeScaleJitterCrop(self.recipe.encoder.img_size, self.recipe.data, self.recipe.detection.scale)

    def lr_scale_of(self, module: Trainable) -> Callable[[str], float] | None:
        return lr_scales(_detector(module), self.recipe.optim)

    def inputs(self, module: Trainable, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        found = batch.targets
        objects = pad_objects(found["boxes"], found["classes"], found["counts"], found["masks"])
        return *objects, torch.randint(0, 2**32, (len(batch.images),), generator=generator)

    def pictures(self, module: Trainable, images: Tensor, inputs: Sequence[Tensor], rows: int) -> list[Column]:
        """What is there beside what is found."""
        return draw_columns(_detector(module), images, inputs, rows, self.classes, self.recipe.data)

    def evaluate(self, module: Trainable, ranks: Ranks, beat: Callable[[], None]) -> dict[str, float]:
        """On `evaluate.shards`: see `evaluate_detector`."""
        return {} if self.recipe.evaluate.shards is None else self._evaluate(module, ranks, beat)

    def evaluate_to(
        self, file: ResultFile, module: Trainable, ranks: Ranks, beat: Callable[[], None]
    ) -> dict[str, float]:
        return self._evaluate(module, ranks, beat, file)

    def _evaluate(
        self, module: Trainable, ranks: Ranks, beat: Callable[[], None], file: ResultFile | None = None
    ) -> dict[str, float]:
        recipe, size = self.recipe, both_sides(self.recipe.encoder.img_size)
        assert recipe.evaluate.shards is not None
        index = self.open_shards(recipe.evaluate.shards)
        scenes = held_out_scenes(index, ranks, partial(fit_into, window=size), beat, recipe.data.num_workers)
        to_device = ToDevice.of(ranks.device, recipe.data)
        batch = recipe.train.micro_batch
        found = evaluate_detector(_detector(module), scenes, size, batch, self.classes, to_device, ranks, file)
        index.store.close()
        return found

    def predict(self, module: Trainable, image: Tensor, device: torch.device, min_score: float) -> Prediction:
        size, data = both_sides(self.recipe.encoder.img_size), self.recipe.data
        found = find_in_image(_detector(module), image, size, ToDevice.of(device, data))
        return draw_found(image, found.above(min_score), self.classes)

    def example_inputs(self, module: Trainable, batch: int) -> tuple[Tensor, ...]:
        height, width = both_sides(self.recipe.encoder.img_size)
        return (
            torch.zeros(batch, _SLOTS, 4),
            torch.zeros(batch, _SLOTS, dtype=torch.int64),
            torch.full((batch,), _OBJECTS),
            torch.zeros(batch * _OBJECTS, height, width // 8, dtype=torch.uint8),
            torch.zeros(batch, dtype=torch.int64),
        )

    def describe(self) -> str:
        return f"Mask R-CNN on {self.recipe.encoder.name}, {len(self.classes)} classes"


def _resolve_classes(recipe: Recipe) -> Recipe:
    """The recipe with its classes: those that it names, or those of `data.shards`.

    Where the shards are out of reach (a plan on another machine), the number of classes that it gives will do.

    Raises:
        UsageError: no classes at all, or another number than the shards name.
    """
    given = recipe.detection
    if given.classes is None:
        if (index := shards_with_classes(recipe, "detection", given.num_classes)) is None:
            return recipe
        given = given.model_copy(update={"classes": index.classes})
        index.store.close()
    if not given.classes:
        raise UsageError(
            f"data.shards={recipe.data.where} names no classes; build the shards with --coco instances.json"
        )
    if given.num_classes not in (None, len(given.classes)):
        raise UsageError(
            f"detection.num_classes={given.num_classes}, but there are {len(given.classes)} classes "
            f"({listed(given.classes)}); set it to {len(given.classes)}, or leave it out"
        )
    given = given.model_copy(update={"num_classes": len(given.classes)})
    return recipe.model_copy(update={"detection": given})


def _detector(module: Trainable) -> MaskRCNN:
    assert isinstance(module, MaskRCNN)
    return module
