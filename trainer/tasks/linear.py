"""Linear probing: classifiers on frozen features, of many learning rates and pooled stages, in one run."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
from mixmae.models.heads.linear_probe import LinearProbe, Variant, variants_of
from mixmae.trainer.data.batch_reader import Batch
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.data.transform import BatchBuffers, RandomResizedCropFlip, SampleTransform, shared_empty
from mixmae.trainer.engine.distributed import Ranks, all_reduce_sum
from mixmae.trainer.engine.optimizer import OptimizerChoice, lars
from mixmae.trainer.evaluation.feature_cache import FeatureCache, open_cache, weights_id
from mixmae.trainer.evaluation.features import features_of
from mixmae.trainer.evaluation.held_out import evaluation_crop, held_out_batches, require_readable
from mixmae.trainer.export.initial_weights import initialise_classifier
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.contract import Task
from mixmae.trainer.tasks.encoder import build_encoder, check_encoder
from mixmae.trainer.tasks.labels import resolve_classes, targets_of
from mixmae.trainer.tasks.registry import register_task

_FEATURES = "features"
"""Folder of the run directory."""


@register_task("linear")
class Linear(Task):
    """MAE's linear probe (LARS, BatchNorm without affine), for all of `linear:` at once.

    Each classifier learns as if it were alone. `top1` is the best one's, as DINOv2 reports it (arXiv 2304.07193).
    """

    unused_sections: ClassVar[tuple[str, ...]] = ("method", "augment", "detection", "segmentation")

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._cache: FeatureCache | None = None
        self._held_out: Tensor | None = None
        """This rank's share; the same at every evaluation."""

    def resolve(self, recipe: Recipe) -> Recipe:
        family = check_encoder(recipe)
        if recipe.classification.multi_label:
            raise UsageError("classification.multi_label=true: task=linear takes one class an image; set it to false")
        if recipe.optim.layer_decay != 1:
            raise UsageError(f"optim.layer_decay={recipe.optim.layer_decay}: the encoder is frozen; leave it out")
        if recipe.train.zero_stage != "auto":  # a run's is fitted
            lars().check(recipe.train.zero_stage)
        stages = max(recipe.linear.stages)
        if stages > family.num_stages:
            raise UsageError(
                f"linear.stages={list(recipe.linear.stages)}: {recipe.encoder.name} has {family.num_stages} stages, of "
                f"which the last {stages} cannot be pooled"
            )
        return resolve_classes(recipe)

    @property
    def variants(self) -> list[Variant]:
        return variants_of(self.recipe.linear.stages, self.recipe.linear.lr_scales)

    def build(self) -> LinearProbe:
        recipe, classes = self.recipe, self.recipe.classification
        assert classes.num_classes is not None, "resolved"
        torch.manual_seed(recipe.seed)
        encoder = build_encoder(recipe)
        return LinearProbe(encoder, classes.num_classes, self.variants, classes.label_smoothing)

    def initialise(self, module: Trainable) -> None:
        if self.recipe.encoder.init is None:
            raise UsageError("encoder.init is not set: a linear probe needs the weights of a pretrained encoder")
        initialise_classifier(_probe(module).encoder, self.recipe.encoder.init, ())

    def optimizer(self) -> OptimizerChoice:
        return lars()

    def lr_scale_of(self, module: Trainable) -> Callable[[str], float]:
        return lambda name: self.variants[int(name.split(".")[1])].lr_scale

    def check_data(self, index: ShardIndex) -> None:
        if self.recipe.linear.cache_features:
            require_readable(index, "linear.cache_features")
        super().check_data(index)

    def check_shards(self, index: ShardIndex, key: str) -> None:
        targets_of(index, self.recipe.classification, key)

    def transform(self, index: ShardIndex) -> SampleTransform:
        table = targets_of(index, self.recipe.classification, "data.shards").table
        if self.recipe.linear.cache_features:
            return LabelAlone(table)
        return LabelledCrop(RandomResizedCropFlip(self.recipe.encoder.img_size, self.recipe.data), table)

    def prepare(self, module: Trainable, index: ShardIndex, ranks: Ranks, beat: Callable[[], None]) -> None:
        """Computes the features of `data.shards` where they are to be cached and are not yet."""
        if not self.recipe.linear.cache_features:
            return
        probe = _probe(module).eval()
        identity = {
            "shards": index.fingerprint,
            "encoder": weights_id(probe.encoder),
            "stages": max(self.recipe.linear.stages),
            "mean": self.recipe.data.mean,
            "std": self.recipe.data.std,
            **self.recipe.data.model_dump(mode="json", include={"scale", "nodata"}, exclude_defaults=True),
        }
        folder = self.recipe.run_dir / _FEATURES
        self._cache = open_cache(folder, identity, lambda: self._features(probe, index, ranks, beat), ranks)
        probe.train()

    def _features(self, probe: LinearProbe, index: ShardIndex, ranks: Ranks, beat: Callable[[], None]) -> Tensor:
        """This rank's share of the features of centre crops."""
        recipe = self.recipe

        batches = held_out_batches(
            index,
            recipe.encoder.img_size,
            recipe.train.micro_batch,
            ranks,
            evaluation_crop(recipe),
            recipe.data.num_workers,
            beat,
            recipe.data.pixels,
        )
        return features_of(
            lambda images: probe.features(images).cpu(),
            batches,
            ToDevice.of(ranks.device, recipe.data),
        )

    def inputs(self, module: Trainable, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        labels = batch.targets["label"]
        return (labels,) if self._cache is None else (labels, self._cache.rows(batch.samples))

    def evaluate(self, module: Trainable, ranks: Ranks, beat: Callable[[], None]) -> dict[str, float]:
        """On `evaluate.shards`: `top1`, `top5` and `val_loss` of the best classifier, and each one's `top1_NAME`."""
        if self.recipe.evaluate.shards is None:
            return {}
        probe, index = _probe(module), self.open_shards(self.recipe.evaluate.shards)
        if self._held_out is None:
            self._held_out = self._features(probe, index, ranks, beat)
        targets = targets_of(index, self.recipe.classification, "evaluate.shards")
        true = targets(index.samples["label"][ranks.rank :: ranks.world_size])
        total = torch.zeros(len(self.variants), 3, dtype=torch.float64, device=ranks.device)
        for x, labels in zip(self._held_out.split(_AT_ONCE), true.split(_AT_ONCE), strict=True):
            there = labels.to(ranks.device)
            total += torch.stack([_sums(logits, there) for logits in probe.logits(x.to(ranks.device))])
        index.store.close()
        shares = (all_reduce_sum(total) / len(index)).tolist()
        best = max(shares, key=lambda of_one: of_one[0])
        each = {f"top1_{variant.name}": of_one[0] for variant, of_one in zip(self.variants, shares, strict=True)}
        return {**dict(zip(("top1", "top5", "val_loss"), best, strict=True)), **each}

    def example_inputs(self, module: Trainable, batch: int) -> tuple[Tensor, ...]:
        labels = torch.zeros(batch, dtype=torch.int64)
        if not self.recipe.linear.cache_features:
            return (labels,)
        return labels, torch.zeros(batch, max(_probe(module).widths))

    def describe(self) -> str:
        classes = self.recipe.classification.num_classes
        return f"{len(self.variants)} linear classifiers of {classes} classes on frozen {self.recipe.encoder.name}"


_AT_ONCE = 1024
"""Images whose features are classified at once in an evaluation."""


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Over images: right ones at first place and among five, and the loss; fp64 [3]."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack([best[:, 0].sum(), best.sum(), F.cross_entropy(logits, labels, reduction="sum")]).double()


@dataclass(frozen=True)
class LabelledCrop(SampleTransform):
    """MAE's augmentation for probes, crop and flip alone, with target `label`: the run's class, int64 [B].

    Attributes:
        table: int64, the run's class of each label of the shards.
    """

    crop: RandomResizedCropFlip
    table: Tensor

    def new_batch(self, count: int) -> BatchBuffers:
        return self.crop.new_batch(count)

    def read(self, content: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int) -> None:
        self.crop.read(content, row, random, buffers, i)
        buffers.targets["label"][i] = self.table[int(row["label"])]


@dataclass(frozen=True)
class LabelAlone(SampleTransform):
    """No pixels, and the target `label`: the run's class, int64 [B]."""

    table: Tensor
    needs_content: ClassVar[bool] = False

    def new_batch(self, count: int) -> BatchBuffers:
        images = torch.empty(count, 3, 0, 0, dtype=torch.uint8)
        return BatchBuffers(images, {"label": shared_empty((count,), torch.int64)})

    def read(self, content: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int) -> None:
        buffers.targets["label"][i] = self.table[int(row["label"])]


def _probe(module: Trainable) -> LinearProbe:
    assert isinstance(module, LinearProbe)
    return module
