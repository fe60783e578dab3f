"""The recipe's `encoder:`, checked and built, for every task."""

from mixmae.base.errors import UsageError
from mixmae.models.encoders.contract import Encoder
from mixmae.models.encoders.registry import create_encoder, family_of
from mixmae.trainer.recipe.components import check_settings, in_keys
from mixmae.trainer.recipe.schema import Recipe

_SET_ELSEWHERE = ("img_size", "num_classes", "global_pool")
"""Arguments of timm's that a recipe sets elsewhere, or not at all."""


def check_encoder(recipe: Recipe) -> type[Encoder]:
    """The class of the recipe's encoder.

    Raises:
        UsageError: an unknown name, or keys that the encoder does not have.
    """
    try:
        family, _ = family_of(recipe.encoder.name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_settings("encoder", family.__init__, recipe.encoder.settings, ("self", *_SET_ELSEWHERE))
    return family


def build_encoder(recipe: Recipe) -> Encoder:
    """The recipe's encoder with random weights, without a head.

    Raises:
        UsageError: sizes that do not fit each other.
    """
    part = recipe.encoder
    try:
        return create_encoder(part.name, img_size=part.img_size, **part.settings)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(in_keys("encoder", family_of(part.name)[0], error)) from error
