"""Label maps: the class of every pixel of an image, as a PNG beside it (`KEY.seg.png`)."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mixmae.trainer.data.faults import Reason, UnusableError

LabelMap = npt.NDArray[np.uint8]
"""[height, width]: class numbers, `IGNORED` where a pixel has none."""
IGNORED = 255
MAX_CLASSES = IGNORED
_IGNORED_16 = 65_535
_DEPTH, _COLOUR_TYPE, _GREY = 24, 25, 0
"""Where a PNG's header says how many bits its values have and what they are; of grey, without alpha."""
_MODES = ("L", "P", "1", "I;16", "I;16B", "I")


def parse_label_map(content: bytes, height: int, width: int) -> LabelMap:
    """The label map in a PNG's bytes: up to 8 bits a pixel, grey or palette (255: ignored), or 16
    (65535: ignored).

    Args:
        height, width: of the upright image.

    Raises:
        UnusableError: the bytes are no such PNG, are of another size, or a label is too large for a class.
    """
    return _to_8_bit(_pixels(content, height, width))


def reduce_zero_label(content: bytes, height: int, width: int) -> bytes:
    """The PNG of a label map in which label 0 is ignored and the others count from 0, as ADE20K is read.

    Raises:
        UnusableError: as `parse_label_map`.
    """
    pixels = _pixels(content, height, width)
    ignored = (pixels == 0) | (pixels == (IGNORED if pixels.dtype == np.uint8 else _IGNORED_16))
    reduced = np.where(ignored, _IGNORED_16, pixels.astype(np.int64) - 1)
    return dump_label_map(_to_8_bit(reduced.astype(np.uint16)))


def dump_label_map(labels: LabelMap) -> bytes:
    """The PNG of a label map."""
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()


def highest_label(labels: LabelMap) -> int:
    """The highest class number of a label map; -1 where all pixels are ignored."""
    return int(labels[labels != IGNORED].max(initial=0)) if (labels != IGNORED).any() else -1


def _pixels(content: bytes, height: int, width: int) -> npt.NDArray[Any]:
    """The pixels as they are stored, uint8 or uint16."""
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG",))
    except Exception as error:  # Pillow raises all kinds of errors
        raise UnusableError(Reason.DAMAGED_ANNOTATION, f"no PNG: {error}") from error
    if image.mode not in _MODES:
        raise UnusableError(
            Reason.DAMAGED_ANNOTATION,
            f"a PNG of mode {image.mode}; expected one channel of class numbers, 8 or 16 bits",
        )
    if image.size != (width, height):  # before so many pixels as it says are decoded
        raise UnusableError(
            Reason.ANNOTATION_OF_ANOTHER_SIZE,
            f"a label map of {image.height} x {image.width} pixels, of an image of {height} x {width}",
        )
    try:
        pixels = np.asarray(image)
    except Exception as error:
        raise UnusableError(Reason.DAMAGED_ANNOTATION, str(error)) from error
    pixels = pixels.astype(np.uint8 if pixels.dtype.itemsize == 1 else np.uint16)
    return pixels // np.uint8(255 // (2 ** content[_DEPTH] - 1)) if _is_stretched(content) else pixels


def _is_stretched(content: bytes) -> bool:
    """Whether Pillow stretches a PNG's values to 0..255: it does so with grey of 2 and 4 bits, to which programs that
    make files smaller reduce a label map."""
    return content[_DEPTH] in (2, 4) and content[_COLOUR_TYPE] == _GREY


def _to_8_bit(pixels: npt.NDArray[Any]) -> LabelMap:
    if pixels.dtype == np.uint8:
        return pixels
    ignored = pixels == _IGNORED_16
    if (pixels[~ignored] >= IGNORED).any():
        raise UnusableError(
            Reason.BAD_LABEL,
            f"label {pixels[~ignored].max()}; expected 0 to {IGNORED - 1}, the {MAX_CLASSES} classes that a run can "
            f"tell apart, or {_IGNORED_16} where a pixel is ignored",
        )
    return np.where(ignored, IGNORED, pixels).astype(np.uint8)
