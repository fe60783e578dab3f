"""Bytes to pixels: decode, random resized crop and flip, with random numbers seeded by (seed, epoch, sample).

A crop is planned first (which box, how flipped) and then decoded by one of two decoders: `pillow`, the plain
reference, and `fast`, which decodes no more of a JPEG than the box needs and resizes in uint8.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mixmae.base.image_size import ImageSize, both_sides
from mixmae.trainer.data import jpeg
from mixmae.trainer.data.arrays import ArrayImage, is_array
from mixmae.trainer.data.crop import (
    ORIENTATIONS,
    Box,
    CropPlan,
    center_crop_box,
    plan_crop,
    sample_crop_box,
    stored_box,
)
from mixmae.trainer.data.encoded_image import (
    FORMATS,
    MAX_PIXELS,
    EncodedImage,
    PartialJpeg,
    Pixels,
    UnconvertedImage,
    WholeImage,
    read_orientation,
    require_affordable,
)
from mixmae.trainer.data.faults import ARRAY, JPEG, OutOfMemoryError, Reason, UnusableError
from mixmae.trainer.data.nodata import fill_invalid, find_valid, resize_valid
from mixmae.trainer.recipe.sections.data import Data
from mixmae.trainer.recipe.sections.pixels import RGB, PixelFormat

Decoder = Literal["fast", "pillow"]

_OUT_OF_MEMORY = ("out of memory", "insufficient memory", "can't allocate memory", "cannot allocate memory")


def random_resized_crop(
    content: bytes,
    state: int,
    size: ImageSize,
    settings: Data,
    random: Random,
    out: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """A random crop, resized (bicubic) and perhaps flipped.

    Args:
        state: the content's, as `inspect_image` gave it.
        out: where the crop is written, uint8 [3, H, W] in channels-last memory, or of the settings' channels and type;
            None allocates.
        valid: bool [H, W], where it is written which of its pixels hold something.

    Raises:
        UnusableError: the content cannot be decoded after all, or has more than `settings.max_pixels`.
        OutOfMemoryError: the machine's memory does not suffice.
    """
    source = open_encoded(content, state, settings.decoder, settings.max_pixels, settings.pixels)
    plan = plan_random_crop(source, size, settings, random)
    return _crop(source, plan, size, settings.decoder, settings.pixels, out, valid)


def center_resized_crop(
    content: bytes,
    state: int,
    size: ImageSize,
    ratio: float = 1.0,
    pixels: PixelFormat = RGB,
    valid: Tensor | None = None,
) -> Tensor:
    """The largest box around the middle with the size's aspect, its sides `ratio` times as long, resized; uint8
    [3, H, W], or of other pixels. It keeps the image's proportions, but for rounding.

    Args:
        valid: as of `random_resized_crop`.
    """
    source = open_encoded(content, state, pixels=pixels)
    width, height = _upright_size(source)
    aspect = _aspect(size)
    left, upper, right, lower = center_crop_box(width, height, (aspect, aspect))
    x, y = (round(side * (1 - ratio) / 2) for side in (right - left, lower - upper))
    box = left + x, upper + y, right - x, lower - y
    plan = plan_crop(box, source.width, source.height, source.orientation, False, size)
    return _crop(source, plan, size, "fast", pixels, None, valid)


def _crop(
    source: EncodedImage,
    plan: CropPlan,
    size: ImageSize,
    decoder: Decoder,
    pixels: PixelFormat,
    out: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    found = decode_crop(source, plan)
    if pixels.nodata is not None:
        there = find_valid(found, pixels.nodata)
        found = fill_invalid(found, there, pixels)
        if valid is not None:
            rows, columns = both_sides(size)[::-1] if plan.transpose else both_sides(size)
            small = resize_valid(there, rows, columns)
            valid.numpy()[:] = _upright(small.T if plan.transpose else small, plan)
    if found.dtype == np.float32 and not np.isfinite(found).all():
        raise UnusableError(Reason.DAMAGED, "values that are not finite; data.nodata=nan would leave out those of NaN")
    return resize_crop(found, plan, size, decoder, out)


def open_encoded(
    content: bytes,
    state: int,
    decoder: Decoder = "fast",
    max_pixels: int = MAX_PIXELS,
    pixels: PixelFormat = RGB,
) -> EncodedImage:
    """Opens an image for decoding.

    Args:
        pixels: RGB, which any image becomes but arrays, or those that it has to have.

    Raises:
        UnusableError: bytes that do not decode as their state says, too many pixels, or other ones.
        OutOfMemoryError: the machine's memory does not suffice.
    """
    with _decoding():
        if state == ARRAY or not pixels.is_rgb:
            whole = ArrayImage if is_array(content) else UnconvertedImage
            return whole(content, max_pixels, pixels)
        if state == JPEG and decoder == "fast" and (header := jpeg.read_header(content)).fast:
            require_affordable(content, header.width * header.height, max_pixels, header.one_scan)
            return PartialJpeg(content, header)
        return WholeImage(content, max_pixels)  # also of an index that called more kinds of JPEG fast


@contextmanager
def _decoding() -> Iterator[None]:
    """Turns whatever decoders raise into UnusableError, but for want of memory, which says nothing of the image."""
    try:
        yield
    except UnusableError:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableError(Reason.TOO_LARGE, str(error)) from error
    except Exception as error:
        raise_if_out_of_memory(error)
        raise UnusableError(Reason.DAMAGED, str(error)) from error


def raise_if_out_of_memory(error: BaseException) -> None:
    """Raises OutOfMemoryError for MemoryError and for what libjpeg, Pillow and torch say instead."""
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        raise OutOfMemoryError(
            f"this process ran out of memory while it decoded an image ({error or 'MemoryError'}); lower --jobs or "
            "data.num_workers, or raise the limit of memory ('ulimit -v')"
        ) from error


def plan_random_crop(source: EncodedImage, size: ImageSize, settings: Data, random: Random) -> CropPlan:
    """A random crop of the upright image, and whether it is mirrored."""
    box = sample_crop_box(*_upright_size(source), settings.crop_scale, random, _aspect(size))
    flip = random.random() < settings.hflip
    return plan_crop(box, source.width, source.height, source.orientation, flip, size)


def upright_size_of(source: EncodedImage) -> tuple[int, int]:
    """Height and width of an image as a viewer shows it."""
    width, height = _upright_size(source)
    return height, width


def decode_upright(source: EncodedImage, box: Box, reduction: int = 1) -> Pixels:
    """A box of the upright image, uint8 [H, W, 3].

    Args:
        box: in reduced pixels, of which the last in a row or column may stand for fewer than `reduction` of the image.
        reduction: 1, or of a JPEG that is stored upright 2, 4 or 8: pixels that become one.

    Raises:
        UnusableError: the decoder finds damage.
    """
    transpose, mirror, upside_down = ORIENTATIONS[source.orientation]
    assert reduction == 1 or source.orientation == 1, "a reduced pixel at the end may stand for fewer of the image"
    height, width = upright_size_of(source)
    left, upper, right, lower = stored_box(box, width, height, source.orientation)
    with _decoding():
        found = source.pixels((left * reduction, upper * reduction, right * reduction, lower * reduction), reduction)
    upright = found.transpose(1, 0, 2) if transpose else found
    return np.ascontiguousarray(upright[:: -1 if upside_down else 1, :: -1 if mirror else 1])


def _aspect(size: ImageSize) -> float:
    """Width over height."""
    height, width = both_sides(size)
    return width / height


def _upright_size(source: EncodedImage) -> tuple[int, int]:
    sideways = ORIENTATIONS[source.orientation][0]
    return (source.height, source.width) if sideways else (source.width, source.height)


def upright_size(content: bytes) -> tuple[int, int]:
    """Height and width of an image as a viewer shows it, read from its header.

    Raises:
        UnusableError: the header cannot be read.
    """
    with _decoding():
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        sideways = ORIENTATIONS[read_orientation(content, image)][0]
        return image.size if sideways else (image.height, image.width)


def decode_crop(source: EncodedImage, plan: CropPlan) -> Pixels:
    """The pixels of the planned box. Raises UnusableError if the decoder finds damage in them."""
    with _decoding():
        return source.pixels(plan.box, plan.reduction)


def resize_crop(
    pixels: Pixels, plan: CropPlan, size: ImageSize, decoder: Decoder = "fast", out: Tensor | None = None
) -> Tensor:
    """Resizes a crop's pixels and turns them upright; [C, H, W] of their type, into `out` if it is given."""
    height, width = both_sides(size)
    out = _empty(height, width, pixels) if out is None else out
    stored = _empty(width, height, pixels) if plan.transpose else out
    _resize(pixels, stored, decoder)
    if plan.transpose:
        out.copy_(stored.transpose(1, 2))
    if turned := [dim for dim, turn in ((1, plan.upside_down), (2, plan.mirror)) if turn]:
        bits = out.view(torch.int16) if out.dtype == torch.uint16 else out  # which torch 2.11 flips no tensors of
        bits.copy_(bits.flip(turned))
    return out


def _upright(values: npt.NDArray[Any], plan: CropPlan) -> npt.NDArray[Any]:
    """[H, W] after the plan's flips."""
    return values[:: -1 if plan.upside_down else 1, :: -1 if plan.mirror else 1]


def _empty(height: int, width: int, like: Pixels) -> Tensor:
    """[C, H, W] of some pixels' channels and type, channels last in memory."""
    dtype = getattr(torch, like.dtype.name)
    return torch.empty(height, width, like.shape[2], dtype=dtype).permute(2, 0, 1)


def _resize(pixels: Pixels, out: Tensor, decoder: Decoder) -> None:
    """Bicubic, with a filter as wide as a pixel of the smaller of both."""
    height, width = out.shape[1:]
    if pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        out.copy_(_resized_values(pixels, height, width, decoder))
    elif decoder == "pillow":
        small = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        out.copy_(torch.from_numpy(np.array(small)).permute(2, 0, 1))
    else:
        # F.interpolate would unpack its result to channels first; this is the operator that it calls.
        whole = torch.from_numpy(np.ascontiguousarray(pixels)[None]).permute(0, 3, 1, 2)
        torch.ops.aten._upsample_bicubic2d_aa.out(whole, [height, width], False, out=out[None])


def _resized_values(pixels: Pixels, height: int, width: int, decoder: Decoder) -> Tensor:
    """[C, H, W] in fp32, channel by channel, rounded to whole numbers where pixels are: torch's filter in 8 bits is off
    by some levels for other numbers of channels than 3."""
    values = pixels.astype(np.float32)
    if decoder == "pillow":
        planes = [Image.fromarray(np.ascontiguousarray(values[..., channel])) for channel in range(values.shape[2])]
        small = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
        resized = torch.from_numpy(np.stack(small))
    else:
        whole = torch.from_numpy(values)[None].permute(0, 3, 1, 2)
        resized = torch.ops.aten._upsample_bicubic2d_aa(whole, [height, width], False)[0]
    if pixels.dtype == np.float32:
        return resized
    return resized.round_().clamp_(0, np.iinfo(pixels.dtype).max)
