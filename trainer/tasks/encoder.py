"""The recipe's `encoder:`, checked and built, for every task."""

from typing import Any

from mixmae.base.errors import UsageError
from mixmae.models.encoders.contract import Encoder
from mixmae.models.encoders.registry import create_encoder, family_of
from mixmae.models.heads.backbone import Backbone
from mixmae.trainer.recipe.components import check_settings, in_keys
from mixmae.trainer.recipe.schema import Recipe

_SET_ELSEWHERE = ("img_size", "in_chans", "num_classes", "global_pool")
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
    if (given := recipe.encoder.settings.get("in_chans")) is not None:
        raise UsageError(f"encoder.in_chans={given}: channels belong to the images; set data.channels={given}")
    check_settings("encoder", family.__init__, recipe.encoder.settings, ("self", *_SET_ELSEWHERE))
    return family


def build_encoder(recipe: Recipe) -> Encoder:
    """The recipe's encoder with random weights, without a head.

    Raises:
        UsageError: sizes that do not fit each other.
    """
    part = recipe.encoder
    try:
        return create_encoder(part.name, **sizes_of(recipe))
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(in_keys("encoder", family_of(part.name)[0], error)) from error


def build_backbone(recipe: Recipe) -> Backbone:
    """The recipe's encoder with random weights, as a detector or segmenter stands on it.

    Raises:
        UsageError: an encoder whose maps have one stride, or sizes that do not fit each other.
    """
    try:
        return Backbone(build_encoder(recipe))
    except ValueError as error:
        raise UsageError(f"encoder.name={recipe.encoder.name}: {error}") from error


def sizes_of(recipe: Recipe) -> dict[str, Any]:
    """Arguments of the recipe's encoder that differ from those of its name."""
    channels = recipe.data.channels
    return {
        "img_size": recipe.encoder.img_size,
        **({} if channels == 3 else {"in_chans": channels}),
        **recipe.encoder.settings,
    }


def require_rgb(recipe: Recipe) -> None:
    """Raises UsageError unless the recipe's images are 8-bit RGB."""
    if not recipe.data.pixels.is_rgb:
        raise UsageError(
            f"task={recipe.task} takes RGB images, and data.channels and data.dtype say {recipe.data.pixels}; set "
            "data.channels=3 and data.dtype=uint8, or take task=pretrain, linear or finetune"
        )
