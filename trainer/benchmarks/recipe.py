"""The recipe of a benchmarked step."""

from collections.abc import Sequence

from mixmae.models.encoders.registry import default_img_size
from mixmae.trainer.recipe.loading import default_recipe
from mixmae.trainer.recipe.schema import Recipe


def recipe_of(model: str, batch: int, overrides: Sequence[str], ranks: int = 1) -> Recipe:
    """The default recipe with another encoder and its image size; `batch` images per rank, no gradient accumulation.

    Raises:
        UsageError: an unknown key or a value outside its range.
    """
    side = default_img_size(model)
    batches = [f"train.micro_batch={batch}", f"train.global_batch={batch * ranks}"]
    return default_recipe([f"encoder.name={model}", f"encoder.img_size={side}", *batches, *overrides])
