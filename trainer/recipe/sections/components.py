"""`encoder:` and `method:`: parts of the model by name, with keys of their own."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator

from mixmae.base.image_size import ImageSize, both_sides
from mixmae.trainer.recipe.sections.section import Section, Weights


class Component(Section):
    """A part of the model by its registered name; it has keys of its own, which it checks itself (`components`)."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """The component's own keys."""
        return dict(self.model_extra or {})


_Side = Annotated[int, Field(gt=0, le=4096)]


class EncoderSection(Component):
    """The encoder, with the sizes that shall differ from those of its name."""

    name: str = "mixmae_swin_base_w14"
    img_size: _Side | tuple[_Side, _Side] = 224
    """Pixels: the side of a square, or [height, width]."""
    init: Weights | None = None
    """What to start from: a directory of `mixmae import` or `mixmae export`, detectors and segmenters included, a run
    directory, `timm:NAME`, or the file or directory of others' weights (docs/encoders.md); None starts from random
    weights."""

    @field_validator("img_size")
    @classmethod
    def _a_square_is_one_side(cls, value: ImageSize) -> ImageSize:
        height, width = both_sides(value)
        return height if height == width else (height, width)


class MethodSection(Component):
    """How the encoder is pretrained."""

    name: str = "mixmae"
