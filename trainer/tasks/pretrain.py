"""Pretraining: an encoder learns from images without labels, by a method."""

import inspect
import re
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
from mixmae.models.encoders.contract import Encoder
from mixmae.models.encoders.registry import create_encoder, family_of
from mixmae.models.methods.contract import Column, Method
from mixmae.models.methods.registry import method_class
from mixmae.trainer.data.index import ShardIndex, open_index
from mixmae.trainer.data.rng import Purpose, torch_at
from mixmae.trainer.data.stream import Batch, ToDevice
from mixmae.trainer.engine.distributed import Ranks, all_reduce_sum
from mixmae.trainer.evaluation.features import pooled
from mixmae.trainer.evaluation.held_out import held_out_batches, require_readable
from mixmae.trainer.evaluation.probe import check_probe_shards, probe_shards
from mixmae.trainer.export.initial_weights import initialise_method
from mixmae.trainer.recipe.components import check_settings
from mixmae.trainer.recipe.schema import MethodSection, Recipe
from mixmae.trainer.tasks.contract import Task
from mixmae.trainer.tasks.registry import register_task

_TIMM = ("img_size", "num_classes", "global_pool")
"""Arguments of encoders that a recipe sets elsewhere, or not at all."""


@register_task("pretrain")
class Pretrain(Task):
    """The recipe's `encoder:` under its `method:`."""

    unused_sections: ClassVar[tuple[str, ...]] = ("classification", "augment", "linear")

    def resolve(self, recipe: Recipe) -> Recipe:
        if recipe.optim.layer_decay != 1:
            raise UsageError(f"optim.layer_decay={recipe.optim.layer_decay}: pretraining has one rate; leave it out")
        try:
            family, _ = family_of(recipe.encoder.name)
            method = method_class(recipe.method.name)
        except ValueError as error:
            raise UsageError(str(error)) from error
        check_settings("encoder", family.__init__, recipe.encoder.settings, ("self", *_TIMM))
        settings = check_settings("method", method.__init__, recipe.method.settings, ("self", "encoder"))
        if None in settings.values():
            with torch.device("meta"):
                settings = method.fitted(settings, _encoder(recipe))
        return recipe.model_copy(update={"method": MethodSection(name=recipe.method.name, **settings)})

    def build(self) -> Method:
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        encoder, method = _encoder(recipe), method_class(recipe.method.name)
        try:
            return method(encoder, **recipe.method.settings)
        except (ValueError, ZeroDivisionError) as error:
            raise UsageError(_with_keys("method", method, error)) from error

    def initialise(self, module: Trainable) -> None:
        if self.recipe.encoder.init is not None:
            initialise_method(_method(module), self.recipe.encoder.init, self.recipe.method.name)

    def check_data(self, index: ShardIndex) -> None:
        """Looks at the shards that are evaluated on: hours later it would be too late."""
        evaluate = self.recipe.evaluate
        if evaluate.shards is not None:
            require_readable(self._open(evaluate.shards), "evaluate.shards")
        if evaluate.probe is not None:
            check_probe_shards(self._open(evaluate.probe.shards), "evaluate.probe")

    def inputs(self, module: Trainable, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        return _method(module).draw(len(batch.images), generator)

    def pictures(self, module: Trainable, images: Tensor, inputs: Sequence[Tensor], rows: int) -> list[Column]:
        return _method(module).reconstruct(images, *inputs, rows=rows)

    def evaluate(self, module: Trainable, ranks: Ranks) -> dict[str, float]:
        """The loss on `evaluate.shards`, drawn alike each time: `val_loss`."""
        recipe = self.recipe
        if recipe.evaluate.shards is None:
            return {}
        index = self._open(recipe.evaluate.shards)
        to_device = ToDevice(ranks.device, recipe.data.mean, recipe.data.std)
        total = torch.zeros(2, device=ranks.device)
        batches = held_out_batches(
            index, recipe.encoder.img_size, recipe.train.micro_batch, ranks, threads=recipe.data.num_workers
        )
        for number, (images, samples) in enumerate(batches):
            generator = torch_at(Purpose.EVALUATION, recipe.seed, ranks.rank, number)
            inputs = _method(module).draw(len(images), generator)
            loss = module(to_device(images), *(part.to(ranks.device) for part in inputs))
            total += torch.stack([loss * len(samples), torch.tensor(float(len(samples)), device=ranks.device)])
        index.store.close()
        loss_sum, count = all_reduce_sum(total).tolist()
        return {"val_loss": loss_sum / count}

    def probe(self, module: Trainable, ranks: Ranks) -> dict[str, float]:
        """`probe_knn` and `probe_linear`, if the images are labelled, `probe_effective_rank`, `probe_mean_cosine`."""
        recipe = self.recipe
        if recipe.evaluate.probe is None:
            return {}
        index = self._open(recipe.evaluate.probe.shards)
        figures = probe_shards(
            pooled(_method(module).encoder),
            index,
            recipe.encoder.img_size,
            ToDevice(ranks.device, recipe.data.mean, recipe.data.std),
            ranks,
            batch=recipe.train.micro_batch,
            threads=recipe.data.num_workers,
        )
        index.store.close()
        return {f"probe_{name}": value for name, value in figures.items()}

    def _open(self, shards: str) -> ShardIndex:
        return open_index(shards, self.recipe.data.network, self.recipe.data.cache)

    def example_inputs(self, module: Trainable, batch: int) -> tuple[Tensor, ...]:
        return _method(module).draw(batch, torch.Generator().manual_seed(0))

    def describe(self) -> str:
        return f"{self.recipe.encoder.name} by {self.recipe.method.name}"


def _encoder(recipe: Recipe) -> Encoder:
    part = recipe.encoder
    try:
        return create_encoder(part.name, img_size=part.img_size, **part.settings)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(_with_keys("encoder", family_of(part.name)[0], error)) from error


def _with_keys(section: str, component: type, error: Exception) -> str:
    """A component's error in the recipe's words: its arguments as keys."""
    names = [name for name in inspect.signature(component).parameters if "_" in name]
    text = re.sub(rf"\b({'|'.join(names)})\b", rf"{section}.\1", str(error)) if names else str(error)
    return text if f"{section}." in text else f"{section}: {text}"


def _method(module: Trainable) -> Method:
    assert isinstance(module, Method)
    return module
