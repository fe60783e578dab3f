"""`detection:`: objects with boxes and masks."""

from typing import Self

from pydantic import Field, model_validator

from mixmae.trainer.recipe.sections.section import Section


class Detection(Section):
    """What a detector learns to find, and on which crops."""

    num_classes: int | None = Field(None, gt=0)
    """None: as many as `data.shards` has."""
    classes: tuple[str, ...] | None = None
    """Their names, in the order of their numbers; None: those of `data.shards`."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Large-scale jitter: an image's size over the largest that fits into encoder.img_size, drawn evenly between these
    two."""

    channels: int = Field(256, gt=0, le=4096)
    """Of the feature pyramid and of the heads' convolutions."""
    rois: int = Field(512, ge=4, le=4096)
    """Boxes of an image that a step of the box head learns from; the mask head learns from a quarter of them."""

    @model_validator(mode="after")
    def _scales_ascend(self) -> Self:
        low, high = self.scale
        if not 0 < low <= high <= 16:
            raise ValueError(f"scale={[low, high]}: expected 0 < low <= high <= 16")
        return self
