"""How good a segmenter is on held-out images, while it is trained."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixmae.base.image_size import both_sides
from mixmae.models.heads.upernet import Segmenter
from mixmae.trainer.data.dense.held_out import held_out_scenes
from mixmae.trainer.data.dense.resizing import fit_over
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine.distributed import Ranks, all_reduce_max, all_reduce_sum
from mixmae.trainer.evaluation.intersection_over_union import count_pixels, figures
from mixmae.trainer.evaluation.sliding_window import classes_of, count_windows, sliding_logits
from mixmae.trainer.recipe.schema import Recipe


def window_stride(recipe: Recipe) -> tuple[int, int]:
    """Pixels between two windows, down and across: the recipe's, or two thirds of a window, which are 341 of 512."""
    height, width = both_sides(recipe.segmentation.stride or recipe.encoder.img_size)
    return (height, width) if recipe.segmentation.stride else (height * 2 // 3, width * 2 // 3)


def class_names(recipe: Recipe) -> list[str]:
    """Names of the run's classes; their numbers, where they have no names."""
    given = recipe.segmentation
    return list(given.classes or map(str, range(given.num_classes or 0)))


def evaluate_segmenter(
    segmenter: Segmenter,
    index: ShardIndex,
    recipe: Recipe,
    ranks: Ranks,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`miou`, `pixel_accuracy`, `mean_accuracy` and `iou/NAME` of each class, over all pixels of the set.

    An image is resized so that it covers a window of `encoder.img_size`; labels are compared at their own size. All
    ranks call it together; every image counts once.

    Raises:
        UsageError: an image or its label map cannot be read.
    """
    to_device = ToDevice.of(ranks.device, recipe.data)
    size, stride = both_sides(recipe.encoder.img_size), window_stride(recipe)
    batch, threads = recipe.train.micro_batch, recipe.data.num_workers
    counts = torch.zeros(3, segmenter.num_classes, dtype=torch.int64, device=ranks.device)
    for scene in held_out_scenes(index, ranks, partial(fit_over, window=size), beat, threads):
        image = to_device(scene.image[None])[0]
        # At ZeRO 3 a pass gathers weights from all ranks: each takes as many.
        height, width = image.shape[1:]
        passes = all_reduce_max(-(-count_windows(height, width, size, stride) // batch), ranks)
        logits = sliding_logits(segmenter, image, size, stride, batch, passes)
        if scene.counts:
            assert isinstance(scene.annotation, np.ndarray), "label maps"
            labels = torch.from_numpy(scene.annotation).to(ranks.device)
            counts += count_pixels(classes_of(logits, scene.original_size), labels, segmenter.num_classes)
    return figures(all_reduce_sum(counts), class_names(recipe))


@torch.no_grad()
def segment_image(segmenter: Segmenter, image: Tensor, recipe: Recipe, device: torch.device) -> Tensor:
    """The class of each pixel, uint8 [H, W] on the CPU, of an image uint8 [3, H, W]; as in an evaluation."""
    height, width = image.shape[1:]
    size, to_device = both_sides(recipe.encoder.img_size), ToDevice.of(device, recipe.data)
    rows, columns = fit_over(height, width, size)
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((columns, rows), Image.Resampling.BILINEAR)
    resized = to_device(torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None])[0]
    logits = sliding_logits(segmenter, resized, size, window_stride(recipe), batch=1)
    return classes_of(logits, (height, width)).cpu()
