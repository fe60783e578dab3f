"""Image, mask, box and label map in a window, against slow references."""

import io
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from mixmae.trainer.data.decode import open_encoded, upright_size, upright_size_of
from mixmae.trainer.data.dense.masks import Mask, encode
from mixmae.trainer.data.dense.view import View
from mixmae.trainer.data.faults import JPEG, PILLOW


@st.composite
def views(draw: st.DrawFn) -> View:
    """Windows on images of up to 40 px, resized to 1 to 90 px on each side."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    resized = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    rows, columns = draw(st.integers(1, min(32, resized[0]))), draw(st.integers(1, min(32, resized[1])))
    top, left = draw(st.integers(0, resized[0] - rows)), draw(st.integers(0, resized[1] - columns))
    return View(height, width, resized, top, left, rows, columns, draw(st.booleans()))


def blobs(height: int, width: int, seed: int) -> Mask:
    """Some boxes of a random size, or nothing."""
    random = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(random.integers(4)):
        y, x = random.integers(height), random.integers(width)
        mask[y : y + random.integers(1, 12), x : x + random.integers(1, 12)] = 1
    return mask


def centre(view: View, row: int, column: int) -> tuple[Fraction, Fraction]:
    """The point of the upright image at the centre of a window's pixel, in pixels from its upper left corner."""
    column = view.columns - 1 - column if view.mirrored else column
    y = (view.top + row + Fraction(1, 2)) * view.height / view.resized[0]
    x = (view.left + column + Fraction(1, 2)) * view.width / view.resized[1]
    return y, x


def seen(view: View, values: Mask) -> Mask:
    """What the window shows of a mask or label map, pixel by pixel."""
    found = np.zeros((view.rows, view.columns), np.uint8)
    for row in range(view.rows):
        for column in range(view.columns):
            y, x = centre(view, row, column)
            found[row, column] = values[math.floor(y), math.floor(x)]
    return found


def png(pixels: Mask, orientation: int = 1) -> bytes:
    """A PNG that a viewer shows as `pixels`."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = image.transpose(undo[orientation]) if orientation in undo else image
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


@given(views(), st.integers(0, 2**32))
def test_masks_boxes_and_label_maps_follow_pixel_by_pixel(view: View, seed: int) -> None:
    mask = blobs(view.height, view.width, seed)
    expected = seen(view, mask)
    assert np.array_equal(view.labels(mask * 7), expected * 7)
    found = view.mask(encode(mask))
    if found is None:
        assert not expected.any()
        return
    padded = np.zeros((32, 32), np.uint8)
    padded[: view.rows, : view.columns] = expected
    assert np.array_equal(np.unpackbits(found.packed(32, 32), axis=1), padded)
    y, x = np.nonzero(expected)
    assert found.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)


@given(views(), st.integers(0, 2**32), st.integers(1, 8))
def test_images_follow_their_masks(view: View, seed: int, orientation: int) -> None:
    """Where everything that a pixel is made of lies inside, or outside of, the object, the image says so too."""
    mask = blobs(view.height, view.width, seed)
    content = png(np.repeat(mask[..., None] * 255, 3, 2), orientation)
    source = open_encoded(content, PILLOW)
    assert upright_size(content) == upright_size_of(source) == mask.shape
    pixels, labels = view.pixels(source)[..., 0], view.labels(mask)
    reach = [max(Fraction(1), Fraction(a, b)) for a, b in zip(mask.shape, view.resized, strict=True)]
    for row in range(view.rows):
        for column in range(view.columns):
            y, x = centre(view, row, column)
            rows = slice(max(0, math.floor(y - reach[0])), math.ceil(y + reach[0]))
            columns = slice(max(0, math.floor(x - reach[1])), math.ceil(x + reach[1]))
            around = mask[rows, columns]
            if around.min() == around.max():
                assert pixels[row, column] == 255 * labels[row, column] == 255 * around[0, 0]


@given(views(), st.integers(0, 2**32), st.integers(1, 8))
def test_a_window_is_a_part_of_the_resized_image(view: View, seed: int, orientation: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (view.height, view.width, 3), np.uint8)
    whole = np.asarray(Image.fromarray(pixels).resize(view.resized[::-1], Image.Resampling.BILINEAR))
    expected = whole[view.top : view.top + view.rows, view.left : view.left + view.columns].astype(int)
    expected = expected[:, ::-1] if view.mirrored else expected
    found = view.pixels(open_encoded(png(pixels, orientation), PILLOW))
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_reduced_decoding_moves_nothing(reduction: int) -> None:
    """A JPEG whose sides are no multiples of anything, decoded at a part of its resolution, and as a whole."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (12, 9, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((301, 403), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=98)
    resized = 403 // (2 * reduction) - 1, 301 // (2 * reduction) - 1
    for window in ((0, 0), (resized[0] - 15, resized[1] - 15)):
        view = View(403, 301, resized, *window, 15, 15)
        fast, whole = (view.pixels(open_encoded(buffer.getvalue(), state)).astype(int) for state in (JPEG, PILLOW))
        difference = np.abs(fast - whole).mean()
        assert difference < 1.5
        assert np.abs(fast[:, 1:] - whole[:, :-1]).mean() > 2 * difference
