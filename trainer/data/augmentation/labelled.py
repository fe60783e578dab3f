"""What a data worker makes of a labelled sample."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mixmae.base.image_size import ImageSize
from mixmae.trainer.data.augmentation.erasing import RandomErasing
from mixmae.trainer.data.augmentation.rand_augment import RandAugment
from mixmae.trainer.data.decode import random_resized_crop
from mixmae.trainer.data.encoded_image import Pixels
from mixmae.trainer.data.transform import BatchBuffers, SampleTransform, shared_empty, shared_images
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.data import Data


@dataclass(frozen=True)
class LabelledCrop(SampleTransform):
    """A random crop, resized to `size` and perhaps flipped, then augmented; with the target `label`.

    All in the images' own type, in the batch's own memory: no more of a JPEG is decoded than the crop needs, and
    normalising is left to the device.

    Attributes:
        targets: by the label's number in the index, [labels] or [labels, classes].
    """

    size: ImageSize
    settings: Data
    targets: Tensor
    rand_augment: RandAugment | None = None
    erasing: RandomErasing | None = None

    def new_batch(self, count: int) -> BatchBuffers:
        labels = shared_empty((count, *self.targets.shape[1:]), self.targets.dtype)
        return BatchBuffers(shared_images(count, self.size, self.settings.pixels), {"label": labels})

    def read(self, content: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int) -> None:
        random_resized_crop(content, int(row["state"]), self.size, self.settings, random, buffers.images[i])
        self.augment(buffers.images[i].permute(1, 2, 0).numpy(), random)
        buffers.targets["label"][i] = self.targets[int(row["label"])]

    def augment(self, pixels: Pixels, random: Random) -> None:
        """What happens to a crop, in place."""
        if self.rand_augment is not None:
            before = Image.fromarray(pixels)
            after = self.rand_augment(before, random)
            if after is not before:
                np.copyto(pixels, np.asarray(after))
        if self.erasing is not None:
            self.erasing(pixels, random)


def labelled_crop(recipe: Recipe, targets: Tensor) -> LabelledCrop:
    """The transform of a recipe's crops and augmentation.

    Raises:
        UsageError: `augment.rand_augment` is not in timm's notation.
    """
    augment, data = recipe.augment, recipe.data
    drawn = None if augment.rand_augment is None else RandAugment.parse(augment.rand_augment, data.mean)
    erasing = (
        RandomErasing(augment.random_erasing, data.mean, data.std, data.pixels) if augment.random_erasing > 0 else None
    )
    return LabelledCrop(recipe.encoder.img_size, data, targets, drawn, erasing)
