"""What the pixels of images are: how many channels, of which type, and which of them hold nothing."""

from typing import Literal, NamedTuple

DType = Literal["uint8", "uint16", "float32"]
FULL_SCALE: dict[str, float] = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
"""What values are divided by where a recipe does not say."""


class PixelFormat(NamedTuple):
    """Of the images that a model takes.

    Attributes:
        scale: what values are divided by before mean and standard deviation.
        nodata: the value of pixels that hold nothing, perhaps NaN; None: all hold something.
        fill: of each channel, what stands in their place: the mean, which is 0 once images are normalised.
    """

    channels: int = 3
    dtype: DType = "uint8"
    scale: float = FULL_SCALE["uint8"]
    nodata: float | None = None
    fill: tuple[float, ...] = (0.0, 0.0, 0.0)

    @property
    def is_rgb(self) -> bool:
        """Whether any image becomes 8-bit RGB; else images have to have these channels and this type."""
        return self.channels == 3 and self.dtype == "uint8"

    def __str__(self) -> str:
        return f"{self.channels} channel{'s'[: self.channels != 1]} of {self.dtype}"


RGB = PixelFormat()
