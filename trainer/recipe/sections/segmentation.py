"""`segmentation:`: images of which every pixel has a class."""

from typing import Self

from pydantic import Field, model_validator

from mixmae.trainer.recipe.sections.section import Section


class Segmentation(Section):
    """What a segmenter learns to tell apart, on which crops, and how it is tested."""

    num_classes: int | None = Field(None, gt=1, le=255)
    """None: as many as `data.shards` has."""
    classes: tuple[str, ...] | None = None
    """Their names, in the order of their numbers; None: those of `data.shards`, () where they have numbers alone."""
    width: int = Field(512, gt=0, le=4096)
    """Of the maps in UperNet's head."""
    scale: tuple[float, float] = (0.5, 2.0)
    """An image's size before it is cropped, over the smallest that covers encoder.img_size; drawn evenly between these
    two."""
    stride: int | None = Field(None, gt=0)
    """Pixels between two windows in which an image is tested; None: two thirds of encoder.img_size, 341 of 512."""

    @model_validator(mode="after")
    def _scales_ascend(self) -> Self:
        low, high = self.scale
        if not 0 < low <= high <= 16:
            raise ValueError(f"scale={[low, high]}: expected 0 < low <= high <= 16")
        return self
