"""HEIC and HEIF images, which data workers do not decode: building shards converts them to PNG."""

import importlib.util
import io
from collections.abc import Iterable

from PIL import Image

from mixmae.base.errors import UsageError
from mixmae.trainer.data.encoded_image import MAX_PIXELS
from mixmae.trainer.data.extensions import CONVERTED_EXTENSIONS
from mixmae.trainer.data.faults import Reason, UnusableError, first_names

_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Of the ftyp box that opens such a file (ISO/IEC 23008-12)."""


def is_heic(content: bytes) -> bool:
    """Whether bytes are such an image, whatever the file is called: phones export them as .jpg too."""
    return content[4:8] == b"ftyp" and content[8:12] in _BRANDS


def require_heic_reader(names: Iterable[str]) -> None:
    """Raises UsageError where images among these need a package that is not installed."""
    heic = [name for name in names if name.lower().rpartition(".")[2] in CONVERTED_EXTENSIONS]
    if heic and not _has_reader():
        raise UsageError(
            f"{len(heic)} HEIC images ({first_names(heic)}) need pillow-heif: pip install 'mixmae[heic]', or convert "
            "them to JPEG or PNG yourself"
        )


def to_png(content: bytes) -> bytes:
    """The image upright, 8 bits a channel, as PNG: the same pixels as the decoder gives.

    Raises:
        UnusableError: it is damaged, or too large; the decoder is not installed.
    """
    if not _has_reader():
        raise UnusableError(Reason.NOT_AN_IMAGE, "HEIC, which needs pillow-heif")
    import pillow_heif

    try:
        # It turns images upright itself, as the file says.
        found = pillow_heif.open_heif(io.BytesIO(content), convert_hdr_to_8bit=True)
        if found.size[0] * found.size[1] > MAX_PIXELS:
            raise UnusableError(Reason.TOO_LARGE, f"{found.size[0]} x {found.size[1]} pixels")
        image: Image.Image = found.to_pillow()
    except UnusableError:
        raise
    except Exception as error:  # libheif's are of several kinds
        raise UnusableError(Reason.DAMAGED, str(error)) from error
    buffer = io.BytesIO()
    Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, "PNG")  # no Exif, which would turn it again
    return buffer.getvalue()


def _has_reader() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None
