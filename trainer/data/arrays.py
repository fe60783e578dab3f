"""Images whose values are kept: any number of channels, 8 or 16 bits or floats, in .npy and TIFF.

Nothing is converted but what is exact: an image has the channels and the type that the recipe says, or is unusable.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from numpy.lib import format as npy

from mixmae.trainer.data.faults import Reason, UnusableError
from mixmae.trainer.recipe.sections.pixels import PixelFormat

Values = npt.NDArray[Any]
"""[H, W, C]."""
_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_EXACT: Mapping[str, tuple[str, ...]] = {
    "uint8": ("uint8",),
    "uint16": ("uint16",),
    "float32": ("float32", "float16", "uint16", "int16", "uint8", "int8"),
}
"""Types whose values another one holds all."""
_MAX_BYTES = 2**33
"""Of an image in memory: a compressed one may claim any size."""


def is_array(content: bytes) -> bool:
    """Whether bytes begin as a .npy or TIFF file does."""
    return content.startswith((_NPY, *_TIFF))


class ArrayImage:
    """A .npy or TIFF file, whose values are kept as they are.

    Args:
        fmt: the channels and type that it has to have; None for any.

    Raises:
        UnusableError: it has others, or more than `max_pixels`.
    """

    def __init__(self, content: bytes, max_pixels: int, fmt: PixelFormat | None = None) -> None:
        read = _npy if content.startswith(_NPY) else _tiff
        values, self.orientation = read(content, max_pixels)
        self.values = _with_channels(values)
        self.height, self.width = self.values.shape[:2]
        _require_affordable(self.values.shape, self.values.itemsize, max_pixels)
        self.dtype = np.dtype(np.float32)
        if fmt is not None:
            require_format(self.values.shape, self.values.dtype, fmt)
            self.dtype = np.dtype(fmt.dtype)

    def pixels(self, box: tuple[int, int, int, int], reduction: int) -> Values:
        left, upper, right, lower = box
        return np.ascontiguousarray(self.values[upper:lower, left:right], self.dtype)


def _npy(content: bytes, max_pixels: int) -> tuple[Values, int]:
    """A view of the bytes, upright (Exif's orientation 1): nothing is copied."""
    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python's objects")
    _require_affordable(shape, dtype.itemsize, max_pixels)
    values: Values = np.frombuffer(content, dtype, math.prod(shape), stream.tell())
    return values.reshape(shape, order="F" if by_columns else "C"), 1


def _tiff(content: bytes, max_pixels: int) -> tuple[Values, int]:
    """The bands of a file's first page, or, where pages have one band each, of all pages of its size; and their
    orientation, Exif's."""
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        first = file.pages.first
        pages = [first]
        if first.samplesperpixel == 1:
            pages = [page for page in file.pages if not page.is_reduced and page.shape == first.shape]
        _require_affordable((*first.shape, len(pages)), first.dtype.itemsize, max_pixels)
        try:
            bands = [page.asarray() for page in pages]
        except (ValueError, KeyError) as error:
            if "imagecodecs" not in str(error):
                raise
            why = f"{error.args[0]}; install it with: pip install 'mixmae[tiff]', and index the shards again"
            raise UnusableError(Reason.CODEC_MISSING, why) from error
        planes_first, orientation = first.axes == "SYX", first.tags.valueof("Orientation", 1)
    values: Values = bands[0] if len(bands) == 1 else np.stack(bands, axis=-1)
    return np.moveaxis(values, 0, -1) if planes_first else values, orientation if orientation in range(1, 9) else 1


def _with_channels(values: Values) -> Values:
    """[H, W, C]. Raises UnusableError for what is no image."""
    shaped = values[..., None] if values.ndim == 2 else values
    if shaped.ndim != 3 or 0 in shaped.shape:
        raise UnusableError(
            Reason.NOT_AN_IMAGE, f"an array of shape {values.shape}; expected height, width and perhaps channels"
        )
    return shaped


def _require_affordable(shape: Sequence[int], itemsize: int, max_pixels: int) -> None:
    """Raises UnusableError for what takes more memory than an image should, whichever dimension has the channels."""
    values = math.prod(shape)
    pixels = values // max(1, min(shape, default=1)) if len(shape) > 2 else values
    if min(shape, default=0) < 0 or pixels > max_pixels or values * itemsize > _MAX_BYTES:
        raise UnusableError(Reason.TOO_LARGE, f"values of shape {tuple(shape)}; more than {max_pixels} pixels")


def require_format(shape: Sequence[int], dtype: np.dtype[Any], fmt: PixelFormat) -> None:
    """Raises UnusableError unless values [H, W, C] have the format's channels, and a type whose values its type holds
    all."""
    height, width, channels = shape
    name = dtype.newbyteorder("=").name
    if channels != fmt.channels or name not in _EXACT[fmt.dtype]:
        first = " (channels come last)" if height == fmt.channels else ""
        raise UnusableError(
            Reason.OTHER_PIXELS,
            f"{height}x{width} px with {channels} channel{'s'[: channels != 1]} of {name}{first}; "
            f"data.channels and data.dtype say {fmt}",
        )
