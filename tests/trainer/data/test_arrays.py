"""Images of other channels and types: their values reach the batch as they are stored, or are refused."""

import io
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from mixmae.base.errors import UsageError
from mixmae.trainer.data.arrays import ArrayImage
from mixmae.trainer.data.decode import center_resized_crop, random_resized_crop
from mixmae.trainer.data.encoded_image import MAX_PIXELS
from mixmae.trainer.data.faults import ARRAY, PILLOW, Reason, UnusableError, is_usable
from mixmae.trainer.data.inspection import inspect_image
from mixmae.trainer.data.integrity import require_pixels
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.indexing import write_index
from mixmae.trainer.data.shards.sources import open_source
from mixmae.trainer.data.stream import Position, Stream
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.sections.data import Data
from mixmae.trainer.recipe.sections.pixels import PixelFormat
from tests.helpers import tar_of, tiny_recipe


def data(channels: int, dtype: str, **changes: Any) -> Data:
    return Data.model_validate(
        {"channels": channels, "dtype": dtype, "mean": [0.25] * channels, "std": [0.5] * channels, **changes}
    )


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric="minisblack", **options)
    return buffer.getvalue()


def noise(*shape: int, dtype: str = "uint16") -> np.ndarray:
    high = 2 ** (8 * np.dtype(dtype).itemsize) - 1 if dtype != "float32" else 1
    values = np.random.default_rng(0).uniform(0, high, shape)
    return values.astype(dtype)


BANDS = noise(20, 30, 5)
STORED = {
    "npy": npy(BANDS),
    "npy, by columns": npy(np.asfortranarray(BANDS)),
    "npy, big-endian": npy(BANDS.astype(">u2")),
    "tiff": tiff(BANDS, planarconfig="contig"),
    "tiff, planes": tiff(np.moveaxis(BANDS, -1, 0), planarconfig="separate"),
    "tiff, pages": tiff(np.moveaxis(BANDS, -1, 0)),
    "tiff, deflated tiles": tiff(BANDS, planarconfig="contig", compression="zlib", tile=(16, 16)),
    "tiff, big-endian": tiff(BANDS, planarconfig="contig", byteorder=">"),
}


@pytest.mark.parametrize("kind", STORED)
def test_all_bits_of_all_bands_are_kept(kind: str) -> None:
    content = STORED[kind]
    state = inspect_image(content)
    assert state == (PILLOW if kind == "tiff, pages" else ARRAY)  # of pages Pillow sees the first
    found = center_resized_crop(content, state, (20, 30), pixels=data(5, "uint16").pixels)
    assert found.dtype == torch.uint16
    assert np.array_equal(found.permute(1, 2, 0).numpy(), BANDS)


@pytest.mark.parametrize(
    ("values", "kind", "dtype"),
    [
        (noise(12, 9, dtype="uint16"), "PNG", "uint16"),
        (noise(12, 9, dtype="uint16"), "TIFF", "uint16"),
        (noise(12, 9, dtype="uint8"), "PNG", "uint8"),
        (noise(12, 9, 4, dtype="uint8"), "PNG", "uint8"),
        (noise(12, 9, dtype="float32"), "TIFF", "float32"),
    ],
)
def test_what_pillow_reads_without_conversion_is_kept(values: np.ndarray, kind: str, dtype: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    state = inspect_image(buffer.getvalue())
    assert is_usable(state)
    shaped = values.reshape(12, 9, -1)
    found = center_resized_crop(buffer.getvalue(), state, (12, 9), pixels=data(shaped.shape[2], dtype).pixels)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), shaped)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_tiff_stands_upright(orientation: int) -> None:
    content = tiff(BANDS, planarconfig="contig", extratags=[(274, "H", 1, orientation, True)])
    upright = np.rot90(BANDS, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    found = center_resized_crop(content, ARRAY, upright.shape[:2], pixels=data(5, "uint16").pixels)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), upright)


def rgb_png_of_16_bits() -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in noise(4, 4, 3))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def palette() -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "channels", "dtype", "words"),
    [
        (npy(noise(8, 8, 4)), 3, "uint8", "4 channels of uint16; data.channels and data.dtype say 3 channels of uint8"),
        (npy(noise(8, 8, 4, dtype="uint8")), 4, "uint16", "4 channels of uint8"),
        (npy(noise(4, 8, 8)), 4, "uint16", "channels come last"),
        (npy(np.zeros((8, 8, 4), np.float64)), 4, "float32", "4 channels of float64"),
        (rgb_png_of_16_bits(), 3, "uint16", "PNG of mode RGB, 16 bits"),
        (palette(), 1, "uint8", "PNG of mode P"),
    ],
)
def test_nothing_is_converted_that_would_be_lost(content: bytes, channels: int, dtype: str, words: str) -> None:
    state = inspect_image(content)
    assert state in (ARRAY, PILLOW)
    with pytest.raises(UnusableError, match=words) as caught:
        random_resized_crop(content, state, 8, data(channels, dtype), Random(0))
    assert caught.value.reason == Reason.OTHER_PIXELS


@pytest.mark.parametrize("dtype", ["int16", "int8", "float16", "uint16"])
def test_floats_hold_smaller_types_exactly(dtype: str) -> None:
    values = np.arange(-60, 60).reshape(8, 15).astype(dtype)
    found = center_resized_crop(npy(values), ARRAY, (8, 15), pixels=data(1, "float32").pixels)
    assert np.array_equal(found[0].numpy(), values.astype(np.float32))


@pytest.mark.parametrize(
    ("content", "state"),
    [
        (npy(noise(8, 8, 4))[:-1], Reason.DAMAGED),
        (STORED["tiff"][:2000], Reason.DAMAGED),
        (STORED["tiff, deflated tiles"][:-900], Reason.DAMAGED),
        (npy(noise(8)), Reason.NOT_AN_IMAGE),
        (npy(noise(2, 2, 2, 2)), Reason.NOT_AN_IMAGE),
        (npy(np.zeros((0, 4, 3), np.uint8)), Reason.NOT_AN_IMAGE),
        (npy(np.array([["a"]], object)), Reason.DAMAGED),
    ],
)
def test_what_is_no_image_is_counted(content: bytes, state: Reason) -> None:
    assert inspect_image(content) == state


def test_an_array_that_claims_too_many_pixels_is_refused_before_it_is_made() -> None:
    header = npy(np.zeros((1, 1), np.uint8))
    content = header.replace(b"(1, 1), }" + b" " * 12, b"(200000, 100000), }  ")
    assert len(content) == len(header)
    assert inspect_image(content) == Reason.TOO_LARGE


@given(st.binary(max_size=60), st.integers(0, 200))
def test_damage_never_crashes(junk: bytes, at: int) -> None:
    for content in (STORED["npy"], STORED["tiff, deflated tiles"]):
        inspect_image(content[:at] + junk + content[at + len(junk) :])


@given(arrays(np.uint16, (13, 17, 2)), st.integers(5, 30), st.integers(5, 30))
def test_both_decoders_resize_alike_to_a_level(values: np.ndarray, height: int, width: int) -> None:
    fast, plain = (
        random_resized_crop(npy(values), ARRAY, (height, width), data(2, "uint16", decoder=decoder), Random(3))
        for decoder in ("fast", "pillow")
    )
    assert (fast.int() - plain.int()).abs().max() <= 1


def test_8_bits_of_many_channels_are_each_resized_as_grey_ones_are() -> None:
    values = noise(40, 30, 13, dtype="uint8")
    found = random_resized_crop(npy(values), ARRAY, 16, data(13, "uint8"), Random(1))
    for channel in (0, 7, 12):
        alone = random_resized_crop(npy(values[..., channel]), ARRAY, 16, data(1, "uint8"), Random(1))
        assert torch.equal(found[channel], alone[0])


def test_the_device_gets_values_by_their_scale() -> None:
    values = torch.tensor([0, 5000, 65535], dtype=torch.uint16).view(1, 1, 1, 3).expand(1, 2, 1, 3)
    half = data(2, "uint16", mean=[0.5, 0.0], std=[0.1, 1.0])
    found = ToDevice.of(torch.device("cpu"), half)(values)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([-5.0, (5000 / 65535 - 0.5) / 0.1, 5.0]))
    reflectance = ToDevice.of(torch.device("cpu"), data(2, "uint16", scale=10_000, mean=[0, 0], std=[1, 1]))(values)
    torch.testing.assert_close(reflectance[0, 1, 0, 1].item(), 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bands")
    for number in range(8):
        values = np.random.default_rng(number).integers(0, 65536, (40, 48, 4), np.uint16)
        (out / f"{number}.{'npy' if number % 2 else 'tif'}").write_bytes(
            npy(values) if number % 2 else tiff(values, planarconfig="contig", compression="zlib")
        )
    (out / "text.npy").write_bytes(b"no array")
    return out


def test_shards_keep_the_files_and_batches_their_values(folder: Path, tmp_path: Path) -> None:
    built = build_shards(open_source(str(folder)), tmp_path / "shards", 10**6, 0, 1)
    assert [Path(one.source).name for one in built.skipped] == ["text.npy"]
    index = open_index(tmp_path / "shards")
    assert index.samples["state"].tolist() == [ARRAY] * 8
    stored = {index.read(sample) for sample in range(8)}
    assert stored == {file.read_bytes() for file in folder.iterdir() if file.name != "text.npy"}
    pixels = data(4, "uint16", num_workers=0, crop_scale=(1.0, 1.0), hflip=0.0)
    recipe = tiny_recipe(**{"train.global_batch": 8, "train.micro_batch": 8})
    recipe = recipe.model_copy(update={"data": pixels.model_copy(update={"shards": str(tmp_path / "shards")})})
    with Stream(recipe, Ranks(), index, Position(0, 0, index.fingerprint)) as stream:
        batch = next(stream)
    assert batch.images.shape == (8, 4, 64, 64)
    assert batch.images.dtype == torch.uint16
    assert batch.images.float().max() > 60_000
    assert not batch.faults


def test_other_pixels_are_told_before_a_run_starts(folder: Path, tmp_path: Path) -> None:
    index = build_shards(open_source(str(folder)), tmp_path / "shards", 10**6, 0, 1).index
    require_pixels(index, data(4, "uint16"))
    with pytest.raises(UsageError, match=r"4 channels of uint16; data\.channels and data\.dtype say 3 channels"):
        require_pixels(index, Data())
    index.store.close()


def test_arrays_beside_a_photograph_are_no_images_of_it(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    (tmp_path / "0.tar").write_bytes(tar_of({"a.jpg": buffer.getvalue(), "a.npy": npy(noise(8))}))
    write_index(tmp_path)
    index = open_index(tmp_path)
    assert len(index) == 1
    assert index.read(0) == buffer.getvalue()


def test_more_than_max_pixels_are_unusable() -> None:
    with pytest.raises(UnusableError, match="more than 50 pixels") as caught:
        ArrayImage(npy(noise(10, 10, 4)), 50, PixelFormat(4, "uint16"))
    assert caught.value.reason == Reason.TOO_LARGE
    ArrayImage(npy(noise(10, 10, 4)), 100)
    assert MAX_PIXELS > 10**8
