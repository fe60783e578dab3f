import io
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import center_crop as their_center_crop
from torchvision.transforms.functional import resized_crop

from mixmae.base.image_size import ImageSize, both_sides
from mixmae.trainer.benchmarks.photos import jpeg_photo, photo
from mixmae.trainer.data import jpeg
from mixmae.trainer.data.crop import center_crop_box, plan_crop, sample_crop_box
from mixmae.trainer.data.decode import center_resized_crop, open_encoded, random_resized_crop
from mixmae.trainer.data.encoded_image import MAX_PIXELS, PartialJpeg, WholeImage
from mixmae.trainer.data.faults import JPEG, PILLOW, OutOfMemoryError, Reason, UnusableError
from mixmae.trainer.data.inspection import inspect_image
from mixmae.trainer.recipe.sections.data import Data

FAST, PLAIN = Data(decoder="fast"), Data(decoder="pillow")


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def small_photo() -> Image.Image:
    return photo(0).resize((130, 90), Image.Resampling.BICUBIC)


def view(content: bytes, data: Data, seed: int, size: ImageSize = 64, state: int | None = None) -> np.ndarray:
    """[H, W, 3] as integers, to take differences."""
    state = inspect_image(content) if state is None else state
    return random_resized_crop(content, state, size, data, Random(seed)).permute(1, 2, 0).numpy().astype(int)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
def test_crops_lie_inside_the_image(width: int, height: int, seed: int) -> None:
    left, upper, right, lower = sample_crop_box(width, height, (0.2, 1.0), Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


def test_crops_are_distributed_like_torchvisions() -> None:
    random = Random(0)
    ours = np.array([sample_crop_box(500, 375, (0.2, 1.0), random) for _ in range(4000)])
    ours = np.stack([ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 0], ours[:, 1]], axis=1)
    image = Image.new("RGB", (500, 375))
    draws = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = np.array([(w, h, left, top) for top, left, h, w in draws])
    for mine, other in zip(ours.T, theirs.T, strict=True):
        spread = other.std() / np.sqrt(len(other))
        assert abs(mine.mean() - other.mean()) < 6 * spread
        assert np.abs(np.quantile(mine, (0.1, 0.5, 0.9)) - np.quantile(other, (0.1, 0.5, 0.9))).max() < 15


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 300))
@settings(max_examples=300)
def test_plans_lose_no_resolution(width: int, height: int, seed: int, orientation: int, size: int) -> None:
    upright = (height, width) if orientation > 4 else (width, height)
    box = sample_crop_box(*upright, (0.2, 1.0), Random(seed))
    plan = plan_crop(box, width, height, orientation, False, size)
    left, upper, right, lower = plan.box
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    assert not any(side % plan.reduction for side in plan.box)
    assert plan.reduction == 1 or min(right - left, lower - upper) // plan.reduction >= size
    # At most the rounding to whole reduced pixels away from the box that was asked for.
    area = (box[2] - box[0]) * (box[3] - box[1])
    assert (right - left) * (lower - upper) >= area * (1 - 2 * plan.reduction / min(box[2] - box[0], box[3] - box[1]))


@pytest.mark.parametrize(("seed", "size"), [(0, 64), (1, 64), (2, 64), (3, 64), (0, (64, 96)), (1, (96, 32))])
def test_the_reference_is_torchvisions_resized_crop(seed: int, size: ImageSize) -> None:
    image, (height, width) = small_photo(), both_sides(size)
    left, upper, right, lower = sample_crop_box(*image.size, PLAIN.crop_scale, Random(seed), width / height)
    expected = resized_crop(image, upper, left, lower - upper, right - left, [height, width], interpolation=3)
    found = view(encoded(image), Data(decoder="pillow", hflip=0.0), seed, size)
    assert np.array_equal(found, np.asarray(expected))


def test_crops_of_a_rectangle_are_of_its_shape_to_a_third() -> None:
    for seed in range(200):
        left, upper, right, lower = sample_crop_box(500, 375, (0.2, 1.0), Random(seed), aspect_of_view=2.0)
        assert 0 <= left < right <= 500
        assert 0 <= upper < lower <= 375
        assert 2 * 0.74 < (right - left) / (lower - upper) < 2 * 1.35


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_fast_rectangles_are_the_references_and_stand_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(3), "JPEG", quality=95, exif=exif)
    for size in ((96, 160), (160, 96)):
        fast, plain = (view(content, data, 1, size) for data in (FAST, PLAIN))
        assert fast.shape == (*size, 3)
        assert np.abs(fast - plain).mean() < 1.5
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    box = center_crop_box(*upright.size, (0.5, 0.5))
    expected = np.asarray(upright.crop(box).resize((80, 160), Image.Resampling.BICUBIC)).astype(int)
    found = center_resized_crop(content, inspect_image(content), (160, 80)).permute(1, 2, 0).numpy()
    assert np.abs(found - expected).mean() < 3  # a box of whole reduced pixels, and not the same one


def test_fast_views_are_the_references_to_less_than_a_level() -> None:
    differences = [
        np.abs(view(content, FAST, seed, 224) - view(content, PLAIN, seed, 224)).mean()
        for number in range(21)
        for content, seed in [(jpeg_photo(number), number)]
    ]
    assert np.mean(differences) < 0.5
    assert max(differences) < 1.0


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_reduced_views_are_the_references_too(scale: int) -> None:
    """Images so large that they are decoded at a half, a quarter, an eighth."""
    size = 112
    whole = Data(crop_scale=(0.9, 1.0)), Data(crop_scale=(0.9, 1.0), decoder="pillow")
    content = encoded(photo(1).resize((size * scale * 3 // 2, size * scale * 9 // 8)), "JPEG", quality=95)
    header = jpeg.read_header(content)
    for seed in range(4):
        box = sample_crop_box(header.width, header.height, (0.9, 1.0), Random(seed))
        assert plan_crop(box, header.width, header.height, 1, False, size).reduction == scale
        # Blocks of pixels are averaged before they are resized: a little off the one filter over all of them.
        assert np.abs(view(content, whole[0], seed, size) - view(content, whole[1], seed, size)).mean() < 1.5


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}])
def test_boxes_are_bit_for_bit_those_of_the_whole_decode(options: dict[str, object]) -> None:
    content = encoded(photo(2), "JPEG", quality=92, **options)
    source = PartialJpeg(content, jpeg.read_header(content))
    whole = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8)).permute(1, 2, 0).numpy()
    for seed in range(20):
        left, upper, right, lower = sample_crop_box(source.width, source.height, (0.1, 1.0), Random(seed))
        found = source.pixels((left, upper, right, lower), 1)
        assert np.abs(found.astype(int) - whole[upper:lower, left:right]).max() == 0


@pytest.mark.parametrize("data", [FAST, PLAIN], ids=["fast", "pillow"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_flips(kind: str, data: Data) -> None:
    content = encoded(small_photo(), kind)
    one, other = (view(content, data.model_copy(update={"hflip": p}), 1) for p in (0.0, 1.0))
    assert np.array_equal(one, other[:, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("decoder", ["fast", "pillow"])
def test_photographs_stand_upright(orientation: int, decoder: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(3), "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert inspect_image(content) == JPEG
    state = JPEG if decoder == "fast" else PILLOW
    found = center_resized_crop(content, state, 192).permute(1, 2, 0).numpy().astype(int)
    side = min(upright.size)
    expected = their_center_crop(upright, [side, side]).resize((192, 192), Image.Resampling.BICUBIC)
    assert np.abs(found - np.asarray(expected)).mean() < 1.0


def test_a_flip_mirrors_what_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(photo(3), "JPEG", quality=95, exif=exif)
    one, other = (view(content, Data(hflip=p), 1) for p in (0.0, 1.0))
    assert np.abs(one - other[:, ::-1]).mean() < 0.5


def test_evaluation_sees_the_middle() -> None:
    image = small_photo()
    expected = their_center_crop(image, [90, 90])
    found = center_resized_crop(encoded(image), PILLOW, 90)
    assert np.array_equal(found.permute(1, 2, 0), np.asarray(expected))
    assert center_crop_box(90, 130) == (0, 20, 90, 110)


def test_grey_jpegs() -> None:
    content = encoded(small_photo().convert("L"), "JPEG")
    assert inspect_image(content) == JPEG
    assert np.abs(view(content, FAST, 0) - view(content, PLAIN, 0)).mean() < 1.0
    assert not np.ptp(view(content, FAST, 0), axis=2).any()


def test_cmyk_jpegs_are_as_torchvision_sees_them() -> None:
    content = encoded(small_photo().convert("CMYK"), "JPEG", quality=95)
    assert inspect_image(content) == PILLOW
    theirs = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    found = center_resized_crop(content, PILLOW, 90)
    expected = their_center_crop(theirs, [90, 90])
    assert (found.int() - expected.int()).abs().float().mean() < 2.0


def test_sixteen_bits_keep_their_range() -> None:
    grey = np.asarray(small_photo().convert("L"))
    content = encoded(Image.fromarray(grey.astype(np.uint16) * 257))
    assert Image.open(io.BytesIO(content)).mode.startswith("I;16")
    found = center_resized_crop(content, inspect_image(content), 90)
    assert np.array_equal(found[0], np.asarray(their_center_crop(Image.fromarray(grey), [90, 90])))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(mode: str) -> None:
    layer = small_photo().convert("RGBA")
    layer.putalpha(Image.linear_gradient("L").resize(layer.size))
    image = layer.quantize(64) if mode == "P" else layer.convert(mode)
    content = encoded(image)
    rgba = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).astype(float)
    share = rgba[..., 3:] / 255
    expected = rgba[..., :3] * share + 255 * (1 - share)
    found = center_resized_crop(content, inspect_image(content), 90).permute(1, 2, 0).numpy()
    assert np.abs(found - expected[:, 20:110]).max() <= 1.01


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    image = small_photo().convert(mode)
    found = center_resized_crop(encoded(image), PILLOW, 90).permute(1, 2, 0)
    assert np.array_equal(found, np.asarray(their_center_crop(image.convert("RGB"), [90, 90])))


def test_very_large_images() -> None:
    content = encoded(Image.linear_gradient("L").resize((12_000, 9_000)), "JPEG", quality=75)
    assert inspect_image(content) == JPEG
    found = center_resized_crop(content, JPEG, 64)
    expected = np.linspace(0, 255, 64)[None, :, None]
    assert np.abs(found.numpy() - expected).mean() < 4
    assert MAX_PIXELS > 12_000 * 9_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", Reason.EMPTY),
        (b"GIF", Reason.NOT_AN_IMAGE),
        (b"\xff\xd8\xff" + b"\0" * 50, Reason.DAMAGED),
        (encoded(Image.new("RGB", (8, 8)), "JPEG"), JPEG),
        (encoded(Image.new("RGB", (8, 8)), "JPEG") + b"left over", JPEG),
        (encoded(Image.new("RGB", (8, 8)), "WEBP"), PILLOW),
        (encoded(Image.new("RGB", (8, 8)), "JPEG")[:-40], Reason.DAMAGED),
    ],
)
def test_judgements(content: bytes, expected: int) -> None:
    assert inspect_image(content) == expected


@given(st.integers(0, 30), st.integers(1, 400), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_damage_is_judged_and_never_crashes(start: int, length: int, seed: int) -> None:
    content = bytearray(encoded(Image.linear_gradient("L").resize((64, 64)).convert("RGB"), "JPEG"))
    place = len(content) * start // 31
    noise = np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8).tobytes()
    content[place : place + length] = noise[: len(content) - place]
    state = inspect_image(bytes(content))
    if state in (JPEG, PILLOW):
        view(bytes(content), FAST, 0, 32, state)


def with_exif(image: bytes, tiff: bytes) -> bytes:
    segment = b"Exif\0\0" + tiff
    return image[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + image[2:]


@pytest.mark.parametrize(
    "tiff",
    [b"XX", b"II*\0\0", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x04\0\0\0\x01\0\0\0\x06\0\0\0\0"],
)
def test_both_decoders_agree_on_odd_exif(tiff: bytes) -> None:
    content = with_exif(jpeg_photo(1), tiff)
    assert inspect_image(content) == JPEG
    assert np.abs(view(content, FAST, 3) - view(content, PLAIN, 3)).mean() < 1.5
    png = io.BytesIO()
    small_photo().save(png, "PNG", exif=b"Exif\0\0" + tiff)
    state = inspect_image(png.getvalue())
    assert state == Reason.DAMAGED or view(png.getvalue(), FAST, 0, 32, state).shape == (32, 32, 3)


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert inspect_image(content) == Reason.NOT_AN_IMAGE
    assert not (tmp_path / "ran").exists()


def test_content_that_is_not_what_was_judged() -> None:
    whole = encoded(small_photo(), "JPEG")
    for content in (b"", whole[:50], b"text"):
        with pytest.raises(UnusableError):
            view(content, FAST, 0, 32, JPEG)


def test_pillow_reads_what_jpeg_source_reads() -> None:
    content = jpeg_photo(5)
    one, other = PartialJpeg(content, jpeg.read_header(content)), WholeImage(content)
    assert (one.width, one.height, one.orientation) == (other.width, other.height, other.orientation)


def with_frame(content: bytes, kind: int, precision: int = 8) -> bytes:
    """The same bytes under another frame header."""
    at = jpeg.read_header(content).height_at - 5
    return content[: at + 1] + bytes([kind]) + content[at + 2 : at + 4] + bytes([precision]) + content[at + 5 :]


def lossless_jpeg(side: int, first_marker: bytes = b"") -> bytes:
    """A grey lossless JPEG (SOF3, predictor 1) of one value: one Huffman code of one bit, for differences of 0."""
    frame = b"\xff\xc3\x00\x0b\x08" + side.to_bytes(2, "big") * 2 + b"\x01\x01\x11\x00"
    codes = b"\xff\xc4\x00\x14\x00" + bytes([1] + [0] * 15) + b"\x00"
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x00\x00"
    return b"\xff\xd8" + first_marker + frame + codes + scan + bytes(side * side // 8 + 1) + b"\xff\xd9"


@pytest.mark.parametrize("kind", [0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF])
@pytest.mark.parametrize("precision", [2, 8, 12, 16])
def test_the_fast_decoder_sees_8_bit_dct_alone(kind: int, precision: int) -> None:
    content = with_frame(encoded(small_photo(), "JPEG"), kind, precision)
    fast = kind in (0xC0, 0xC1, 0xC2) and precision == 8
    assert jpeg.read_header(content).fast is fast
    assert isinstance(open_or_none(content), PartialJpeg) is fast


def open_or_none(content: bytes) -> object:
    try:
        return open_encoded(content, JPEG)
    except UnusableError:
        return None


def test_a_lossless_jpeg_is_never_reduced_by_the_fast_decoder() -> None:
    content = lossless_jpeg(512)
    assert inspect_image(content) in (PILLOW, Reason.DAMAGED)  # as Pillow's own libjpeg has it
    assert not isinstance(open_or_none(content), PartialJpeg)  # although an older index may call it JPEG


def test_markers_that_libjpeg_reads_otherwise_are_refused() -> None:
    """A parser that takes RST0 for a segment skips the true frame header (SOF3) and finds a harmless one behind it."""
    harmless = encoded(Image.new("L", (512, 512)), "JPEG")
    hidden = lossless_jpeg(512, first_marker=b"\xff\xd0")
    padded = hidden.ljust(4 + int.from_bytes(b"\xff\xc3", "big"), b"\0") + harmless[2:]
    for content in (padded, harmless[:2] + b"\xff\x01" + harmless[2:], hidden):
        with pytest.raises(ValueError, match="no JPEG segment"):
            jpeg.read_header(content)
        assert inspect_image(content) != JPEG
        assert not isinstance(open_or_none(content), PartialJpeg)


def test_a_second_frame_header_is_refused() -> None:
    content = encoded(small_photo(), "JPEG")
    at = jpeg.read_header(content).height_at - 5
    frame = content[at : at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")]
    with pytest.raises(ValueError, match="two frame headers"):
        jpeg.read_header(content[:at] + frame + content[at:])
    assert inspect_image(content[:at] + frame + content[at:]) != JPEG


def with_scans(content: bytes, count: int) -> bytes:
    """A progressive JPEG with its last scan `count` times."""
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * (count - 1) + content[-2:]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_cost_of_scans_is_bounded_before_decoding(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(small_photo().convert(mode), "JPEG", progressive=True)
    honest, bomb = with_scans(content, 20), with_scans(content, 3000)
    assert jpeg.count_scans(bomb) == jpeg.count_scans(content) + 2999
    state = inspect_image(honest)
    assert state in (JPEG, PILLOW)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    monkeypatch.setattr(Image.Image, "load", None)
    assert inspect_image(bomb) == Reason.TOO_LARGE
    for judged in (JPEG, PILLOW):  # also by an index that calls it good
        with pytest.raises(UnusableError, match="scans of") as caught:
            open_encoded(bomb, judged)
        assert caught.value.reason == Reason.TOO_LARGE


def test_scans_are_counted_up_to_the_images_end() -> None:
    content = encoded(small_photo(), "JPEG", progressive=True)
    comment = b"\xff\xfe\0\x0c" + b"\xff\xda\xff\xd9" * 2 + b"\xff\xda"
    assert jpeg.count_scans(content) == 10
    assert jpeg.count_scans(content[:2] + comment + content[2:] + b"\xff\xda" * 9) == 10
    assert jpeg.count_scans(encoded(small_photo(), "JPEG", restart_marker_blocks=1)) == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pixels_are_bounded_by_the_caller(kind: str) -> None:
    content = encoded(small_photo(), kind)
    width, height = small_photo().size
    state = inspect_image(content)
    assert open_encoded(content, state, max_pixels=width * height).width == width
    with pytest.raises(UnusableError, match="more than") as caught:
        open_encoded(content, state, max_pixels=width * height - 1)
    assert caught.value.reason == Reason.TOO_LARGE
    random_resized_crop(content, state, 32, Data(max_pixels=width * height), Random(0))
    with pytest.raises(UnusableError, match="more than"):
        random_resized_crop(content, state, 32, Data(max_pixels=width * height - 1), Random(0))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError("out of memory error when reading image file"),
        ValueError("Insufficient memory (case 4)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_want_of_memory_is_no_damage(error: Exception, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(small_photo(), kind)
    state = inspect_image(content)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    monkeypatch.setattr(Image.Image, "crop", fail)
    with pytest.raises(OutOfMemoryError, match=r"lower --jobs or data\.num_workers"):
        inspect_image(content)
    with pytest.raises(OutOfMemoryError):
        random_resized_crop(content, state, 32, FAST, Random(0))


def test_a_large_image_takes_little_more_memory_than_its_pixels() -> None:
    """In a process of its own, whose address space is bounded: 36 million RGBA pixels are 144 MB."""
    script = (
        "import io, resource, zlib, struct\n"
        "from random import Random\n"
        "from mixmae.trainer.data.decode import random_resized_crop\n"
        "from mixmae.trainer.data.inspection import inspect_image\n"
        "from mixmae.trainer.recipe.schema import Data\n"
        "chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + "
        "struct.pack('>I', zlib.crc32(kind + data))\n"
        "rows = zlib.compress(bytes(6000 * (1 + 4 * 6000)), 1)\n"
        "header = struct.pack('>IIBBBBB', 6000, 6000, 8, 6, 0, 0, 0)\n"
        "png = b'\\x89PNG\\r\\n\\x1a\\n' + chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 420_000_000,) * 2)\n"
        "assert inspect_image(png) == 1\n"
        "random_resized_crop(png, 1, 64, Data(crop_scale=(0.2, 0.3)), Random(0))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SAMPLINGS = {"4:4:4": 0x11, "4:2:2": 0x21, "4:4:0": 0x12, "4:2:0": 0x22, "4:1:1": 0x41, "4:4:1": 0x14, "4:1:0": 0x42}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_is_judged_fast_is_decoded_fast(sampling: str) -> None:
    """A grey image, of which any sampling of its luma can be claimed. simplejpeg has no name for 4:4:1."""
    content = bytearray(encoded(Image.new("RGB", (64, 64), (90, 90, 90)), "JPEG", subsampling="4:4:4"))
    content[content.index(b"\xff\xc0") + 11] = SAMPLINGS[sampling]
    state = inspect_image(bytes(content))
    assert jpeg.read_header(bytes(content)).fast == (sampling != "4:4:1")
    if state in (JPEG, PILLOW):
        open_encoded(bytes(content), state).pixels((8, 8, 40, 40), 1)
        assert state == PILLOW or jpeg.read_header(bytes(content)).fast
