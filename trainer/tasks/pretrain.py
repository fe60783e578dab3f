"""Pretraining: an encoder learns from images without labels, by a method."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.image_size import both_sides
from mixmae.models.contract import Trainable
from mixmae.models.methods.contract import Column, Method
from mixmae.models.methods.registry import method_class
from mixmae.trainer.data.batch_reader import Batch
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.rng import Purpose, torch_at
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.data.transform import VALID
from mixmae.trainer.engine.distributed import Ranks, all_reduce_sum
from mixmae.trainer.evaluation.features import pooled
from mixmae.trainer.evaluation.held_out import held_out_batches
from mixmae.trainer.evaluation.probe import check_probe_shards, probe_shards
from mixmae.trainer.export.initial_weights import initialise_method
from mixmae.trainer.recipe.components import check_settings, in_keys
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.components import MethodSection
from mixmae.trainer.tasks.contract import Task
from mixmae.trainer.tasks.encoder import build_encoder, check_encoder
from mixmae.trainer.tasks.registry import register_task


@register_task("pretrain")
class Pretrain(Task):
    """The recipe's `encoder:` under its `method:`."""

    unused_sections: ClassVar[tuple[str, ...]] = ("classification", "augment", "linear", "detection", "segmentation")

    def resolve(self, recipe: Recipe) -> Recipe:
        if recipe.optim.layer_decay != 1:
            raise UsageError(f"optim.layer_decay={recipe.optim.layer_decay}: pretraining has one rate; leave it out")
        check_encoder(recipe)
        try:
            method = method_class(recipe.method.name)
        except ValueError as error:
            raise UsageError(str(error)) from error
        settings = check_settings("method", method.__init__, recipe.method.settings, ("self", "encoder"))
        if None in settings.values():
            with torch.device("meta"):
                settings = method.fitted(settings, build_encoder(recipe))
        return recipe.model_copy(update={"method": MethodSection(name=recipe.method.name, **settings)})

    def build(self) -> Method:
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        encoder, method = build_encoder(recipe), method_class(recipe.method.name)
        try:
            module = method(encoder, **recipe.method.settings)
        except (ValueError, ZeroDivisionError) as error:
            raise UsageError(in_keys("method", method, error)) from error
        module.set_normalisation(recipe.data.mean, recipe.data.std)
        if recipe.data.nodata is not None:
            try:
                module.mask_invalid_pixels()
            except ValueError as error:
                raise UsageError(f"data.nodata={recipe.data.nodata}: {error}; leave it out") from error
        return module

    def initialise(self, module: Trainable) -> None:
        if self.recipe.encoder.init is not None:
            initialise_method(_method(module), self.recipe.encoder.init, self.recipe.method.name)

    def check_data(self, index: ShardIndex) -> None:
        super().check_data(index)
        if (probe := self.recipe.evaluate.probe) is not None:
            probed = self.open_shards(probe.shards)
            check_probe_shards(probed, "evaluate.probe")
            probed.store.close()

    def inputs(self, module: Trainable, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        drawn = _method(module).draw(len(batch.images), generator)
        return (*drawn, batch.targets[VALID]) if VALID in batch.targets else drawn

    def pictures(self, module: Trainable, images: Tensor, inputs: Sequence[Tensor], rows: int) -> list[Column]:
        return _method(module).reconstruct(images, *inputs, rows=rows)

    def evaluate(self, module: Trainable, ranks: Ranks, beat: Callable[[], None]) -> dict[str, float]:
        """The loss on `evaluate.shards`, drawn alike each time: `val_loss`."""
        recipe = self.recipe
        if recipe.evaluate.shards is None:
            return {}
        index = self.open_shards(recipe.evaluate.shards)
        to_device = ToDevice.of(ranks.device, recipe.data)
        total = torch.zeros(2, device=ranks.device)
        batches = held_out_batches(
            index,
            recipe.encoder.img_size,
            recipe.train.micro_batch,
            ranks,
            threads=recipe.data.num_workers,
            beat=beat,
            pixels=recipe.data.pixels,
        )
        for number, (images, samples, valid) in enumerate(batches):
            generator = torch_at(Purpose.EVALUATION, recipe.seed, ranks.rank, number)
            inputs = (*_method(module).draw(len(images), generator), *(() if valid is None else (valid,)))
            loss = module(to_device(images), *(part.to(ranks.device) for part in inputs))
            total += torch.stack([loss * len(samples), torch.tensor(float(len(samples)), device=ranks.device)])
        index.store.close()
        loss_sum, count = all_reduce_sum(total).tolist()
        return {"val_loss": loss_sum / count}

    def probe(self, module: Trainable, ranks: Ranks, beat: Callable[[], None]) -> dict[str, float]:
        """`probe_knn` and `probe_linear`, if the images are labelled, `probe_effective_rank`, `probe_mean_cosine`."""
        recipe = self.recipe
        if recipe.evaluate.probe is None:
            return {}
        index = self.open_shards(recipe.evaluate.probe.shards)
        figures = probe_shards(
            pooled(_method(module).encoder),
            index,
            recipe.encoder.img_size,
            ToDevice.of(ranks.device, recipe.data),
            ranks,
            batch=recipe.train.micro_batch,
            threads=recipe.data.num_workers,
            beat=beat,
            pixels=recipe.data.pixels,
        )
        index.store.close()
        return {f"probe_{name}": value for name, value in figures.items()}

    def example_inputs(self, module: Trainable, batch: int) -> tuple[Tensor, ...]:
        drawn = _method(module).draw(batch, torch.Generator().manual_seed(0))
        if not _method(module).masks_invalid:
            return drawn
        return *drawn, torch.ones(batch, *both_sides(self.recipe.encoder.img_size), dtype=torch.bool)

    def describe(self) -> str:
        return f"{self.recipe.encoder.name} by {self.recipe.method.name}"


def _method(module: Trainable) -> Method:
    assert isinstance(module, Method)
    return module
