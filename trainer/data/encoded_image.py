"""Encoded images, of which boxes are decoded: JPEGs in part, everything else as a whole by Pillow."""

import io
import warnings
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, features

from mixmae.trainer.data import jpeg
from mixmae.trainer.data.arrays import require_format
from mixmae.trainer.data.crop import ORIENTATIONS, Box
from mixmae.trainer.data.faults import Reason, UnusableError
from mixmae.trainer.recipe.sections.pixels import PixelFormat

Pixels = npt.NDArray[Any]
"""uint8 [H, W, 3], or of a recipe's channels and type."""
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Images with more pixels are taken for decompression bombs, as Pillow takes them: 179 million."""
MAX_SCANS = 100
"""Scans that a JPEG may have; encoders write ten."""
MAX_COST = 10 * MAX_PIXELS
"""Pixels that all scans of a JPEG may have together."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(("AVIF",) if features.check("avif") else ()))
"""What may be decoded, of animations the first frame: among Pillow's further formats are some that start programs."""
_PNG = b"\x89PNG"
_PLAIN_MODES = {"1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16", "I;16L", "I;16B"}
"""Of Pillow, whose values are the file's own: a palette's are not."""

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS says what is too large


class EncodedImage(Protocol):
    """An encoded image of which boxes can be decoded."""

    width: int
    height: int
    orientation: int

    def pixels(self, box: Box, reduction: int) -> Pixels:
        """The pixels of a box, at one of `reduction` or more."""


class PartialJpeg:
    """A JPEG of which little more than a box is decoded; its header is `fast`, its bytes passed `inspect_image`."""

    def __init__(self, content: bytes, header: jpeg.Header) -> None:
        self.content, self.header = content, header
        self.width, self.height, self.orientation = self.header.width, self.header.height, self.header.orientation

    def pixels(self, box: Box, reduction: int) -> Pixels:
        part = jpeg.lossless_crop(self.content, self.header, box)
        size = -(-part.height // reduction), -(-part.width // reduction)
        smallest = dict(zip(("min_height", "min_width"), size, strict=True))
        announced = simplejpeg.decode_jpeg_header(part.content, strict=part.strict, **smallest)[:2]
        if announced != size:  # before anything is written
            raise ValueError(f"the decoder would make {announced} of what the header says is {size}")
        found = simplejpeg.decode_jpeg(part.content, strict=part.strict, **smallest)
        left, upper, right, lower = (
            (side - start) // reduction for side, start in zip(box, 2 * (part.left, part.top), strict=True)
        )
        return found[upper:lower, left:right]


class WholeImage:
    """Any image, decoded as a whole by Pillow, and converted to RGB box by box.

    Raises:
        Image.DecompressionBombError: it has too many pixels, or scans.
    """

    def __init__(self, content: bytes, max_pixels: int = MAX_PIXELS) -> None:
        self.image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        self.width, self.height = self.image.size
        require_affordable(content, self.width * self.height, max_pixels)
        self.orientation = read_orientation(content, self.image)
        self.image.load()
        to_rgb(self.image.crop((0, 0, 1, 1)))  # what cannot be converted is found out now

    def pixels(self, box: Box, reduction: int) -> Pixels:
        return np.array(to_rgb(self.image.crop(box)))


class UnconvertedImage(WholeImage):
    """An image that Pillow decodes, whose values are kept as they are stored.

    Raises:
        UnusableError: it has other channels, another type, or colours that are not the pixels' own values.
    """

    def __init__(self, content: bytes, max_pixels: int, fmt: PixelFormat) -> None:
        super().__init__(content, max_pixels)
        mode, bits = self.image.mode, content[24] if content.startswith(_PNG) else 8
        if mode not in _PLAIN_MODES or (bits == 16 and not mode.startswith("I;16")):
            raise UnusableError(
                Reason.OTHER_PIXELS,
                f"{self.image.format} of mode {mode}, {bits} bits, of which Pillow does not give the values; store it "
                "as TIFF or .npy",
            )
        self.dtype = np.dtype(fmt.dtype)
        one = self._values((0, 0, 1, 1))
        require_format((self.height, self.width, one.shape[2]), one.dtype, fmt)

    def pixels(self, box: Box, reduction: int) -> Pixels:
        return np.ascontiguousarray(self._values(box), self.dtype)

    def _values(self, box: Box) -> Pixels:
        part = self.image.crop(box)
        values = np.asarray(part.convert("L") if part.mode == "1" else part)
        return values[..., None] if values.ndim == 2 else values


def require_affordable(content: bytes, pixels: int, max_pixels: int, one_scan: bool = False) -> None:
    """Raises DecompressionBombError for what takes more memory, or time, than an image of its size should."""
    if pixels > max_pixels:
        raise Image.DecompressionBombError(f"{pixels} pixels, more than {max_pixels}")
    # A decoder stops at a second scan of an image that began with all components in one.
    scans = jpeg.count_scans(content) if jpeg.is_jpeg(content) and not one_scan else 1
    if scans > MAX_SCANS or scans * pixels > MAX_COST:
        raise Image.DecompressionBombError(f"{scans} scans of {pixels} pixels")


def read_orientation(content: bytes, image: Image.Image) -> int:
    """Exif's; of a JPEG as `jpeg` reads it, so that both decoders agree."""
    with suppress(ValueError):
        if jpeg.is_jpeg(content):
            return jpeg.read_header(content).orientation
    found: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in ORIENTATIONS else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey by its high byte, transparency over white, everything else as Pillow converts it.

    Raises:
        UnusableError: floating-point pixels, of which nothing says what is black and what white.
    """
    if image.mode == "F":
        raise UnusableError(Reason.FLOATING_POINT, "floating-point pixels; expected 8 or 16 bits")
    if image.mode.startswith("I"):
        high = np.asarray(image) >> 8  # uint16, or int32 of mode I
        return Image.fromarray(high.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
