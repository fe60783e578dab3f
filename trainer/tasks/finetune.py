"""Fine-tuning: an encoder and a linear head learn the classes of labelled shards."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.image_size import both_sides
from mixmae.models.contract import Trainable
from mixmae.models.heads.classification import Classifier
from mixmae.models.heads.mixup import MixSettings, draw_mix
from mixmae.trainer.data.augmentation.labelled import labelled_crop
from mixmae.trainer.data.augmentation.rand_augment import RandAugment
from mixmae.trainer.data.batch_reader import Batch
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.transform import SampleTransform
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.layer_decay import lr_scales
from mixmae.trainer.evaluation.classification import evaluate_classifier
from mixmae.trainer.export.initial_weights import initialise_classifier
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.contract import Task
from mixmae.trainer.tasks.encoder import build_encoder, check_encoder
from mixmae.trainer.tasks.labels import resolve_classes, targets_of
from mixmae.trainer.tasks.registry import register_task


@register_task("finetune")
class Finetune(Task):
    """The recipe's `encoder:`, all of it trained, on the classes of `data.shards`."""

    unused_sections: ClassVar[tuple[str, ...]] = ("method", "linear", "detection", "segmentation")

    def resolve(self, recipe: Recipe) -> Recipe:
        check_encoder(recipe)
        if recipe.augment.rand_augment is not None:
            if not recipe.data.pixels.is_rgb:
                raise UsageError(
                    f"augment.rand_augment={recipe.augment.rand_augment}: its operations are for 8-bit RGB, and the "
                    f"images have {recipe.data.pixels}; leave it out"
                )
            RandAugment.parse(recipe.augment.rand_augment, recipe.data.mean)
        return resolve_classes(recipe)

    @property
    def mixing(self) -> MixSettings:
        augment = self.recipe.augment
        return MixSettings(augment.mixup, augment.cutmix, augment.mix_prob, augment.switch_prob)

    def build(self) -> Classifier:
        recipe, classes = self.recipe, self.recipe.classification
        assert classes.num_classes is not None, "resolved"
        torch.manual_seed(recipe.seed)
        encoder = build_encoder(recipe)
        return Classifier(
            encoder, classes.num_classes, classes.multi_label, classes.label_smoothing, mixes=self.mixing.mixes
        )

    def initialise(self, module: Trainable) -> None:
        if self.recipe.encoder.init is not None:
            classes = self.recipe.classification.classes or ()
            initialise_classifier(_classifier(module).encoder, self.recipe.encoder.init, classes)

    def check_shards(self, index: ShardIndex, key: str) -> None:
        targets_of(index, self.recipe.classification, key)

    def transform(self, index: ShardIndex) -> SampleTransform:
        return labelled_crop(self.recipe, targets_of(index, self.recipe.classification, "data.shards").table)

    def lr_scale_of(self, module: Trainable) -> Callable[[str], float] | None:
        return lr_scales(_classifier(module), self.recipe.optim)

    def inputs(self, module: Trainable, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        labels = batch.targets["label"]
        if not self.mixing.mixes:
            return (labels,)
        return labels, draw_mix(self.mixing, (batch.images.shape[2], batch.images.shape[3]), generator)

    def evaluate(self, module: Trainable, ranks: Ranks, beat: Callable[[], None]) -> dict[str, float]:
        """On `evaluate.shards`: `val_loss`, and `top1` and `top5`, or `f1` where labels are several."""
        if self.recipe.evaluate.shards is None:
            return {}
        index = self.open_shards(self.recipe.evaluate.shards)
        targets = targets_of(index, self.recipe.classification, "evaluate.shards")
        found = evaluate_classifier(_classifier(module), index, targets, self.recipe, ranks, beat)
        index.store.close()
        return found

    def example_inputs(self, module: Trainable, batch: int) -> tuple[Tensor, ...]:
        classifier = _classifier(module)
        shape = (batch, classifier.num_classes) if classifier.multi_label else (batch,)
        labels = torch.zeros(shape, dtype=torch.uint8 if classifier.multi_label else torch.int64)
        if not self.mixing.mixes:
            return (labels,)
        return labels, draw_mix(self.mixing, both_sides(self.recipe.encoder.img_size), torch.Generator().manual_seed(0))

    def describe(self) -> str:
        return f"{self.recipe.encoder.name} fine-tuned on {self.recipe.classification.num_classes} classes"


def _classifier(module: Trainable) -> Classifier:
    assert isinstance(module, Classifier)
    return module
