"""What tasks share about a run's classes, which a recipe names or `data.shards` does."""

from collections.abc import Sequence

from mixmae.base.errors import UsageError
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.recipe.schema import Recipe


def shards_with_classes(recipe: Recipe, section: str, num_classes: int | None) -> ShardIndex | None:
    """`data.shards`; None where they are out of reach (a plan on another machine) and the number of classes will do.

    Args:
        section: of the recipe, which has `num_classes`.

    Raises:
        UsageError: they are out of reach, and nothing else says how many classes there are.
    """
    try:
        return open_index(recipe.data.shards, recipe.data.network, recipe.data.cache)
    except UsageError as error:
        if num_classes is not None:
            return None
        raise UsageError(f"{section}.num_classes is not set, and {error}") from error


def listed(names: Sequence[str]) -> str:
    """The first few names, for messages."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
