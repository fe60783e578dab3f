"""How an image's bytes decode, found out by decoding all of them: what an index notes of each image."""

import simplejpeg
from PIL import Image, UnidentifiedImageError

from mixmae.trainer.data import jpeg
from mixmae.trainer.data.arrays import ArrayImage, is_array
from mixmae.trainer.data.decode import raise_if_out_of_memory
from mixmae.trainer.data.encoded_image import MAX_PIXELS, WholeImage, require_affordable
from mixmae.trainer.data.faults import ARRAY, JPEG, PILLOW, Reason, UnusableError, is_usable

_DAMAGE = ("premature end", "bad huffman code", "found marker", "unsupported marker", "bogus")
"""Parts of libjpeg's messages that mean damage, in lower case; on any other message Pillow decides."""


def inspect_image(content: bytes) -> int:
    """How an image's bytes decode: `JPEG`, `PILLOW`, `ARRAY`, or the `Reason` why they do not. Decodes all of it.

    Raises:
        OutOfMemoryError: the machine's memory does not suffice.
    """
    if not content:
        return Reason.EMPTY
    try:
        if jpeg.is_jpeg(content) and (state := _inspect_jpeg(content)) is not None:
            return state
        state = _inspect_with_pillow(content)
        return _inspect_array(content) if not is_usable(state) and is_array(content) else state
    except Exception as error:  # decoders raise all kinds of errors
        raise_if_out_of_memory(error)
        return Reason.DAMAGED


def _inspect_jpeg(content: bytes) -> int | None:
    """The state of a JPEG, or None where Pillow has to decide."""
    try:
        header = jpeg.read_header(content)
    except ValueError:
        return None
    try:
        require_affordable(content, header.width * header.height, MAX_PIXELS, header.one_scan)
    except Image.DecompressionBombError:
        return Reason.TOO_LARGE
    if not header.fast or header.components not in (1, 3):
        return None
    try:
        simplejpeg.decode_jpeg_header(content)
        simplejpeg.decode_jpeg(content)
    except KeyError:  # a sampling that simplejpeg has no name for
        return None
    except ValueError as error:
        raise_if_out_of_memory(error)
        return Reason.DAMAGED if any(sign in str(error).lower() for sign in _DAMAGE) else None
    return JPEG


def _inspect_with_pillow(content: bytes) -> int:
    try:
        WholeImage(content)
    except UnidentifiedImageError:
        return Reason.DAMAGED if jpeg.is_jpeg(content) else Reason.NOT_AN_IMAGE
    except Image.DecompressionBombError:
        return Reason.TOO_LARGE
    except UnusableError as error:
        return error.reason
    return PILLOW


def _inspect_array(content: bytes) -> int:
    try:
        ArrayImage(content, MAX_PIXELS)
    except UnusableError as error:
        return error.reason
    return ARRAY
