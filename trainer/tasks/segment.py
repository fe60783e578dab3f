"""Segmentation: an encoder and UperNet learn the class of every pixel."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.image_size import both_sides
from mixmae.models.contract import Trainable
from mixmae.models.heads.backbone import Backbone
from mixmae.models.heads.upernet import Segmenter
from mixmae.models.methods.contract import Column
from mixmae.trainer.data.batch_reader import Batch
from mixmae.trainer.data.dense.segmentation import SegmentationCrop
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.integrity import require_annotations, require_judged_pixels
from mixmae.trainer.data.transform import SampleTransform
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.layer_decay import lr_scales
from mixmae.trainer.evaluation.label_colors import paint_normalised, picture
from mixmae.trainer.evaluation.segmentation import class_names, evaluate_segmenter, segment_image
from mixmae.trainer.export.initial_weights import initialise_backbone
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.classes import listed, shards_with_classes
from mixmae.trainer.tasks.contract import Prediction, Task
from mixmae.trainer.tasks.encoder import build_encoder, check_encoder, require_rgb
from mixmae.trainer.tasks.registry import register_task


@register_task("segment")
class Segment(Task):
    """The recipe's `encoder:` as a backbone of UperNet, all of it trained, on the label maps of `data.shards`."""

    unused_sections: ClassVar[tuple[str, ...]] = ("method", "classification", "linear", "augment", "detection")
    exports_whole = True

    def resolve(self, recipe: Recipe) -> Recipe:
        check_encoder(recipe)
        require_rgb(recipe)
        return _with_classes(recipe)

    def build(self) -> Segmenter:
        part = self.recipe.segmentation
        assert part.num_classes is not None, "resolved"
        torch.manual_seed(self.recipe.seed)
        try:
            backbone = Backbone(build_encoder(self.recipe))
        except ValueError as error:
            raise UsageError(f"encoder.name={self.recipe.encoder.name}: {error}") from error
        return Segmenter(backbone, part.num_classes, part.width)

    def initialise(self, module: Trainable) -> None:
        if self.recipe.encoder.init is not None:
            initialise_backbone(_segmenter(module).encoder, self.recipe.encoder.init)

    def check_shards(self, index: ShardIndex, key: str) -> None:
        require_annotations(index, "segments", key)
        classes = self.recipe.segmentation.classes
        if classes and index.classes and index.classes != classes:
            raise UsageError(
                f"{key}={index.store.location} has {len(index.classes)} classes ({listed(index.classes)}), and the "
                f"segmenter {len(classes)} ({listed(classes)}); build the shards with its list of classes, "
                "--class-names FILE"
            )

    def check_held_out(self, index: ShardIndex, key: str) -> None:
        super().check_held_out(index, key)
        require_judged_pixels(index, key)

    def transform(self, index: ShardIndex) -> SampleTransform:
        return SegmentationCrop(self.recipe.encoder.img_size, self.recipe.data, self.recipe.segmentation.scale)

    def lr_scale_of(self, module: Trainable) -> Callable[[str], float] | None:
        return lr_scales(_segmenter(module), self.recipe.optim)

    def inputs(self, module: Trainable, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (batch.targets["segmentation"],)

    def pictures(self, module: Trainable, images: Tensor, inputs: Sequence[Tensor], rows: int) -> list[Column]:
        """Images, their labels and what the segmenter takes their pixels for; ignored pixels have no colour."""
        images, labels, data = images[:rows], inputs[0][:rows], self.recipe.data
        predicted = module(images).argmax(1).to(torch.uint8)
        painted = (paint_normalised(images, part, data.mean, data.std) for part in (labels, predicted))
        return [Column(*pair) for pair in zip(("image", "labels", "predicted"), (images, *painted), strict=True)]

    def evaluate(self, module: Trainable, ranks: Ranks, beat: Callable[[], None]) -> dict[str, float]:
        """On `evaluate.shards`: `miou`, `pixel_accuracy`, `mean_accuracy` and each class's `iou/NAME`."""
        if self.recipe.evaluate.shards is None:
            return {}
        index = self.open_shards(self.recipe.evaluate.shards)
        found = evaluate_segmenter(_segmenter(module), index, self.recipe, ranks, beat)
        index.store.close()
        return found

    def predict(self, module: Trainable, image: Tensor, device: torch.device, min_score: float) -> Prediction:
        """Colours over the image, and each class's share of its pixels."""
        found = segment_image(_segmenter(module), image, self.recipe, device)
        shares = found.flatten().bincount(minlength=_segmenter(module).num_classes).double() / found.numel()
        ranked = sorted(zip(shares.tolist(), class_names(self.recipe), strict=True), key=lambda pair: -pair[0])
        classes = {name: share for share, name in ranked if share > 0}
        return Prediction(picture(image, found), {"classes": classes}, [f"{v:6.1%}  {k}" for k, v in classes.items()])

    def example_inputs(self, module: Trainable, batch: int) -> tuple[Tensor, ...]:
        return (torch.zeros(batch, *both_sides(self.recipe.encoder.img_size), dtype=torch.uint8),)

    def describe(self) -> str:
        part = self.recipe.segmentation
        return f"UperNet of width {part.width} on {self.recipe.encoder.name}, {part.num_classes} classes"


def _with_classes(recipe: Recipe) -> Recipe:
    """The recipe with its classes: those that it names, or those of `data.shards`.

    Where the shards are out of reach (a plan on another machine), the number of classes that it gives will do.

    Raises:
        UsageError: no classes at all, or another number than the shards name.
    """
    given = recipe.segmentation
    if given.classes is None:
        if (index := shards_with_classes(recipe, "segmentation", given.num_classes)) is None:
            return recipe
        given = given.model_copy(update={"classes": index.classes})
        index.store.close()
    if given.num_classes not in (None, len(given.classes or ()) or given.num_classes):
        raise UsageError(
            f"segmentation.num_classes={given.num_classes}, but there are {len(given.classes or ())} classes by name "
            f"({listed(given.classes or ())}); set it to their number, or leave it out"
        )
    number = given.num_classes or len(given.classes or ())
    if number < 2:
        raise UsageError(
            f"segmentation.num_classes is not set, and data.shards={recipe.data.where} names {number} classes; set "
            "it, or build the shards with their names"
        )
    return recipe.model_copy(update={"segmentation": given.model_copy(update={"num_classes": number})})


def _segmenter(module: Trainable) -> Segmenter:
    assert isinstance(module, Segmenter)
    return module
