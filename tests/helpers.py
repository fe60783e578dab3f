"""What several tests share: ranks as processes, small recipes, small shards."""

import io
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mixmae.base.errors import UsageError
from mixmae.trainer.benchmarks import ranks
from mixmae.trainer.data.shards.indexing import write_index
from mixmae.trainer.recipe.loading import parse_recipe
from mixmae.trainer.recipe.schema import Recipe
from tests.warm import start_method

ROOT = Path(__file__).parents[1]
"""Of the checkout."""
RANKS_TIMEOUT = 600
SLOW_RANKS_TIMEOUT = 3600
markers: set[str] | None = None
"""Of the test that runs, by which it belongs to a tier; None outside of tests."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What each rank's `function(ranks, *args)` returned; a rank that hangs fails."""
    if world_size > 1:
        is_marked("distributed", "slow")
    timeout = SLOW_RANKS_TIMEOUT if markers is not None and "slow" in markers else RANKS_TIMEOUT
    return ranks.run_ranks(function, world_size, *args, timeout=timeout, start_method=start_method())


def is_marked(*names: str) -> None:
    """Fails a test that has none of these markers, and so runs in a tier that it does not belong to."""
    assert markers is None or markers.intersection(names), f"mark this test with pytest.mark.{names[0]}"


def needs_jpegtran() -> None:
    """Skips a test where jpegtran is missing; fails it in CI, which installs it."""
    is_marked("services", "slow")
    if shutil.which("jpegtran") is None:
        lacks("needs the program jpegtran: apt-get install libjpeg-turbo-progs")


def needs_onnx() -> None:
    """Skips a test where packages for ONNX are missing; fails it in CI, which installs them."""
    is_marked("distributed", "slow")
    from mixmae.trainer.export.onnx_model import require_onnx

    try:
        require_onnx()
    except UsageError as error:
        lacks(str(error))


def lacks(reason: str) -> NoReturn:
    """Ends a test that cannot run on this machine: skipped, or failed in CI, which has all that tests need."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def tar_of(files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of files by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def coloured_shards(out: Path, images: int = 24) -> Path:
    """Noise of 64 px, reddish or bluish and labelled so: a probe of any encoder tells them apart."""
    generator = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    for number in range(images):
        noise = generator.integers(0, 100, (64, 64, 3), dtype=np.uint8)
        noise[..., 2 * (number % 2)] += 150
        jpeg = io.BytesIO()
        Image.fromarray(noise).save(jpeg, "JPEG", quality=95)
        files |= {f"{number:03d}.jpg": jpeg.getvalue(), f"{number:03d}.cls": (b"red", b"blue")[number % 2]}
    out.mkdir(parents=True)
    (out / "0.tar").write_bytes(tar_of(files))
    write_index(out)
    return out


def tiny_recipe(**changes: Any) -> Recipe:
    """A recipe that trains in seconds: 64 px images, four cells, a few thousand parameters. Keys are dotted paths."""
    content: dict[str, Any] = {
        "encoder": {
            "name": "mixmae_swin_nano",
            "img_size": 64,
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": [4, 4, 4, 2],
        },
        "method": {"num_images": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        "data": {"num_workers": 0},
        "train": {"duration": "8 steps", "global_batch": 8, "micro_batch": 2, "precision": "fp32", "zero_stage": 1},
        "optim": {"base_lr": 3e-2, "warmup": "2 steps"},
        "checkpoint": {"every": "1000 steps"},
        "log": {"every": 1, "pictures": None},
    }
    if changes.get("task", "pretrain") != "pretrain":
        del content["method"]
    for path, value in changes.items():
        *sections, key = path.split(".")
        here = content
        for section in sections:
            here = here.setdefault(section, {})
        before = here.get(key)
        here[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return parse_recipe(content, "tiny")


def idx_file(array: npt.NDArray[np.uint8]) -> bytes:
    """An IDX file of an array of bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def png_file(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """An RGB PNG with this header and these rows, whether or not they fit each other."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
