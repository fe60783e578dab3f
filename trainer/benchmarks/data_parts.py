"""Where the time of a data worker goes, and how far its fast decoder is from Pillow's."""

import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch

from mixmae.trainer.benchmarks.data_pipelines import Variant, transform_of
from mixmae.trainer.data.augmentation.labelled import LabelledCrop
from mixmae.trainer.data.batch_reader import BatchReader
from mixmae.trainer.data.decode import decode_crop, open_encoded, plan_random_crop, random_resized_crop, resize_crop
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.order import BatchSlice, SampleRef
from mixmae.trainer.data.rng import Purpose, random_at
from mixmae.trainer.recipe.schema import Recipe


def parts_of_work(recipe: Recipe, variant: Variant, count: int = 300) -> dict[str, float]:
    """Microseconds per image on one core, by part of a worker's work."""
    index, size = open_index(variant.shards), recipe.encoder.img_size
    settings, spent = variant.settings, dict.fromkeys(("read", "decode", "resize", "augment", "collate"), 0.0)
    samples = [number % len(index) for number in range(count)]
    transform = transform_of(recipe, variant, index)
    reader = BatchReader(index, transform, recipe.seed)
    request = BatchSlice([SampleRef(0, sample, 0) for sample in samples], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reader.__getitems__(request)
    for sample in samples:
        times = [time.perf_counter()]
        content = index.read(sample)
        times.append(time.perf_counter())
        source = open_encoded(content, int(index.samples[sample]["state"]), settings.decoder)
        random = random_at(Purpose.AUGMENTATION, recipe.seed, 0, sample)
        plan = plan_random_crop(source, size, settings, random)
        pixels = decode_crop(source, plan)
        times.append(time.perf_counter())
        resized = resize_crop(pixels, plan, size, settings.decoder)
        times.append(time.perf_counter())
        if isinstance(transform, LabelledCrop):
            transform.augment(resized.permute(1, 2, 0).numpy(), random)
        times.append(time.perf_counter())
        for part, (start, end) in zip(spent, pairwise(times), strict=False):
            spent[part] += end - start
    started = time.perf_counter()
    reader.__getitems__(request)
    whole = time.perf_counter() - started
    spent["collate"] = max(0.0, whole - sum(spent.values()))
    torch.set_num_threads(threads)
    index.store.close()
    return {part: round(value / count * 1e6, 1) for part, value in spent.items()}


def difference_to_pillow(recipe: Recipe, shards: Path, count: int = 100) -> float:
    """Mean absolute difference between the crops of both decoders, on a scale of 255."""
    index = open_index(shards)
    differences = []
    for sample in range(min(count, len(index))):
        content, state = index.read(sample), int(index.samples[sample]["state"])
        fast, plain = (
            random_resized_crop(
                content,
                state,
                recipe.encoder.img_size,
                recipe.data.model_copy(update={"decoder": decoder}),
                random_at(Purpose.AUGMENTATION, recipe.seed, 0, sample),
            )
            for decoder in ("fast", "pillow")
        )
        differences.append(float((fast.int() - plain.int()).abs().float().mean()))
    index.store.close()
    return statistics.mean(differences)
