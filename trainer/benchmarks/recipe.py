"""The recipe whose step a benchmark runs."""

from collections.abc import Sequence

from mixmae.models.encoders.registry import default_img_size
from mixmae.trainer.recipe.loading import default_recipe
from mixmae.trainer.recipe.schema import Recipe


def recipe_of(model: str, batch: int, overrides: Sequence[str], ranks: int = 1) -> Recipe:
    """All defaults but for the encoder and its image size; so many images on each rank, nothing accumulated.

    Raises:
        UsageError: an unknown key or a value outside its range.
    """
    side = default_img_size(model)
    batches = [f"train.micro_batch={batch}", f"train.global_batch={batch * ranks}"]
    return default_recipe([f"encoder.name={model}", f"encoder.img_size={side}", *batches, *overrides])
