import io
import random
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from mixmae.base.errors import UsageError
from mixmae.trainer.data import jpeg
from tests.helpers import needs_jpegtran

INTERVALS = [{"restart_marker_blocks": blocks} for blocks in range(1, 7)]
SAMPLINGS = {"4:4:4": (8, 8), "4:2:2": (16, 8), "4:2:0": (16, 16)}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1)).convert(mode)


def encode(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "a camera"
    tags[0x0112] = orientation
    return tags


def pixels(content: bytes) -> npt.NDArray[np.uint8]:
    return simplejpeg.decode_jpeg(content)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_headers_say_what_pillow_says(mode: str, progressive: bool) -> None:
    content = encode(picture(70, 37, mode), progressive=progressive)
    image, header = Image.open(io.BytesIO(content)), jpeg.read_header(content)
    assert (header.width, header.height) == image.size == (70, 37)
    assert header.components == len(image.getbands())
    assert header.one_scan is not progressive
    assert header.orientation == 1
    assert content[header.height_at : header.height_at + 2] == (37).to_bytes(2, "big")


@pytest.mark.parametrize(("sampling", "unit"), SAMPLINGS.items())
def test_headers_tell_the_coded_units(sampling: str, unit: tuple[int, int]) -> None:
    header = jpeg.read_header(encode(picture(70, 37), subsampling=sampling))
    assert (header.unit_width, header.unit_height) == unit
    assert header.context == (unit[0] > 8, unit[1] > 8)
    assert header.restart_interval == 0
    with_restarts = jpeg.read_header(encode(picture(70, 37), subsampling=sampling, restart_marker_rows=1))
    assert with_restarts.restart_interval == -(-70 // unit[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_headers_tell_the_orientation(orientation: int) -> None:
    assert jpeg.read_header(encode(picture(20, 10), exif=exif(orientation))).orientation == orientation


def test_an_orientation_that_makes_no_sense_turns_nothing() -> None:
    assert jpeg.read_header(encode(picture(20, 10), exif=exif(9))).orientation == 1
    content = encode(picture(20, 10), exif=exif(6))
    start = content.index(b"Exif\0\0") + 6
    cut = content[: start + 4] + b"\xff\xff\xff\x7f" + content[start + 8 :]
    assert jpeg.read_header(cut).orientation == 1


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from(["grey", *SAMPLINGS]),
    st.sampled_from(
        [{}, {"progressive": True}, *({"restart_marker_blocks": n} for n in range(1, 7)), {"restart_marker_rows": 1}]
    ),
    st.data(),
)
def test_boxes_are_those_of_the_whole(
    width: int, height: int, kind: str, options: dict[str, Any], data: st.DataObject
) -> None:
    image = picture(width, height, "L" if kind == "grey" else "RGB")
    content = encode(image, **options, **({} if kind == "grey" else {"subsampling": kind}))
    left, upper = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, lower = data.draw(st.integers(left + 1, width)), data.draw(st.integers(upper + 1, height))
    part = jpeg.lossless_crop(content, jpeg.read_header(content), (left, upper, right, lower))
    found = simplejpeg.decode_jpeg(part.content, strict=part.strict)
    assert found.shape[:2] == (part.height, part.width)
    box = found[upper - part.top : lower - part.top, left - part.left : right - part.left]
    assert np.array_equal(box, pixels(content)[upper:lower, left:right])


def test_a_small_box_is_few_bytes() -> None:
    content = encode(picture(400, 400), restart_marker_blocks=5)
    part = jpeg.lossless_crop(content, jpeg.read_header(content), (200, 200, 220, 220))
    assert (part.width, part.height) <= (160, 64)
    assert len(part.content) < len(content) / 8


@pytest.mark.services
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_restarts_change_no_pixel(options: dict[str, Any], mode: str) -> None:
    needs_jpegtran()
    content = encode(picture(200, 150, mode), exif=exif(6), icc_profile=b"a profile", **options)
    rewritten = jpeg.add_restarts(content)
    assert np.array_equal(pixels(content), pixels(rewritten))
    header = jpeg.read_header(rewritten)
    assert header.one_scan
    assert -(-header.width // header.unit_width) % header.restart_interval == 0
    assert header.restart_interval <= 4
    before, after = Image.open(io.BytesIO(content)), Image.open(io.BytesIO(rewritten))
    assert dict(before.getexif()) == dict(after.getexif())
    assert after.info["icc_profile"] == b"a profile"
    part = jpeg.lossless_crop(rewritten, header, (60, 70, 80, 90))
    assert (part.width, part.height) < (120, 90)
    box = pixels(bytes(part.content))[70 - part.top : 90 - part.top, 60 - part.left : 80 - part.left]
    assert np.array_equal(box, pixels(content)[70:90, 60:80])


@pytest.mark.services
def test_a_table_that_is_wrong_is_passed_over() -> None:
    """As when another program codes the image anew and keeps the segment."""
    needs_jpegtran()
    one, other = (jpeg.add_restarts(encode(picture(200, 150).rotate(angle))) for angle in (0, 180))
    assert jpeg.read_header(one).lengths != jpeg.read_header(other).lengths
    header = jpeg.read_header(one)
    for wrong in (jpeg.read_header(other).lengths, header.lengths[:-2], b""):
        part = jpeg.lossless_crop(one, header._replace(lengths=wrong), (60, 70, 80, 90))
        assert np.array_equal(part.content, jpeg.lossless_crop(one, header, (60, 70, 80, 90)).content)


@pytest.mark.services
@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0"])
def test_what_jpegtran_cannot_read(content: bytes) -> None:
    needs_jpegtran()
    with pytest.raises(ValueError, match=r"\w"):
        jpeg.add_restarts(content)


def test_headers_of_damaged_files_are_value_errors() -> None:
    content = encode(picture(40, 30), exif=exif(3))
    end = jpeg.read_header(content).scan_at
    for cut in range(end - 2):
        try:
            header = jpeg.read_header(content[:cut])
        except ValueError:
            continue
        assert (header.width, header.height) == (40, 30)
    drawn = random.Random(0)
    for _ in range(500):
        damaged = bytearray(content)
        damaged[drawn.randrange(2, end)] ^= 1 << drawn.randrange(8)
        with suppress(ValueError):
            jpeg.read_header(bytes(damaged))


def test_a_missing_jpegtran_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    jpeg.require_jpegtran.cache_clear()
    with pytest.raises(UsageError, match="apt-get install libjpeg-turbo-progs"):
        jpeg.require_jpegtran()
    jpeg.require_jpegtran.cache_clear()


@pytest.mark.services
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_table_of_another_image_is_not_trusted(mode: str) -> None:
    """Its lengths add up to the image's end, but no restart markers stand where it says."""
    needs_jpegtran()
    content = jpeg.add_restarts(encode(picture(130, 110, mode)))
    header = jpeg.read_header(content)
    lengths = np.frombuffer(header.lengths, ">u2")
    whole = pixels(content)
    for shift in (1, 2, 7):
        wrong = lengths.copy()
        wrong[3], wrong[4] = wrong[3] + shift, wrong[4] - shift
        stale = content.replace(header.lengths, wrong.tobytes(), 1)
        part = jpeg.lossless_crop(stale, jpeg.read_header(stale), (32, 40, 80, 72))
        found = pixels(bytes(part.content))[40 - part.top : 72 - part.top, 32 - part.left : 80 - part.left]
        assert np.array_equal(found, whole[40:72, 32:80])
    swapped = content.replace(header.lengths, lengths[::-1].tobytes(), 1)
    part = jpeg.lossless_crop(swapped, jpeg.read_header(swapped), (32, 40, 80, 72))
    found = pixels(bytes(part.content))[40 - part.top : 72 - part.top, 32 - part.left : 80 - part.left]
    assert np.array_equal(found, whole[40:72, 32:80])
