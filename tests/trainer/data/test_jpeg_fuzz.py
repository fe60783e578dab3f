"""Mutated JPEGs through the decoding path: no crash, no hang, no pixel other than those of the whole file's decode.

Each batch of files runs in a forked process, whose death or silence is the finding.
"""

import io
import multiprocessing
import random
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageFilter

from mixmae.trainer.data import jpeg
from mixmae.trainer.data.crop import plan_crop, sample_crop_box
from mixmae.trainer.data.decode import random_resized_crop
from mixmae.trainer.data.encoded_image import PartialJpeg
from mixmae.trainer.data.faults import JPEG, PILLOW, UnusableError
from mixmae.trainer.data.inspection import inspect_image
from mixmae.trainer.recipe.sections.data import Data
from tests.helpers import needs_jpegtran

FILES, BATCH, PICTURES = 20_000, 500, 60
SECONDS = 300.0
"""For a batch, which takes some five on a quiet core."""
BOXES = 4

Segment = tuple[int, int, int]
"""Offset, marker and length."""


@cache
def picture(number: int) -> bytes:
    """A small JPEG of one of many kinds, some of them with restart markers and a table of their own."""
    rng = np.random.default_rng(number)
    width, height = int(rng.integers(17, 150)), int(rng.integers(17, 150))
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    options = {
        "quality": int(rng.integers(30, 96)),
        "progressive": number % 4 == 1,
        "subsampling": ("4:2:0", "4:4:4", "4:2:2")[number % 3],
        **({"restart_marker_blocks": int(rng.integers(1, 9))} if number % 4 == 2 else {}),
    }
    buffer = io.BytesIO()
    noise.filter(ImageFilter.GaussianBlur(1)).convert("L" if number % 5 == 4 else "RGB").save(buffer, "JPEG", **options)
    return jpeg.add_restarts(buffer.getvalue()) if number % 4 == 3 else buffer.getvalue()


def segments(content: bytes | bytearray) -> list[Segment]:
    """Those before the first scan's data."""
    found, at = [], 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        size = int.from_bytes(content[at + 2 : at + 4], "big")
        found.append((at, content[at + 1], size))
        if content[at + 1] == 0xDA:
            break
        at += 2 + size
    return found


def one_of(rng: random.Random, content: bytearray, *markers: int) -> Segment:
    """Raises IndexError where there is none."""
    return rng.choice([segment for segment in segments(content) if segment[1] in markers])


def scan_start(content: bytearray) -> int:
    at, _, size = segments(content)[-1]
    return at + 2 + size


FRAMES = (0xC0, 0xC1, 0xC2)


def flip_a_bit(rng: random.Random, content: bytearray) -> None:
    content[rng.randrange(scan_start(content), len(content))] ^= 1 << rng.randrange(8)


def change_a_header_byte(rng: random.Random, content: bytearray) -> None:
    content[rng.randrange(2, scan_start(content))] = rng.randrange(256)


def truncate(rng: random.Random, content: bytearray) -> None:
    del content[rng.randrange(2, len(content)) :]


def change_the_size(rng: random.Random, content: bytearray) -> None:
    at, _, _ = one_of(rng, content, *FRAMES)
    field = at + 5 + 2 * rng.randrange(2)
    (side,) = struct.unpack_from(">H", content, field)
    sides = [0, 1, 65535, rng.randrange(600), *(max(0, side + d) for d in (-33, -16, -8, -1, 1, 8, 16))]
    struct.pack_into(">H", content, field, rng.choice(sides))


def change_the_sampling(rng: random.Random, content: bytearray) -> None:
    at, _, _ = one_of(rng, content, *FRAMES)
    content[at + 11 + 3 * rng.randrange(content[at + 9])] = rng.choice([0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0x31, 0])


def change_the_frame(rng: random.Random, content: bytearray) -> None:
    at, _, _ = one_of(rng, content, *FRAMES)
    offset, values = rng.choice([(1, range(0xC0, 0xD0)), (4, range(17)), (9, range(6))])
    content[at + offset] = rng.choice(values)


def insert_a_restart_interval(rng: random.Random, content: bytearray) -> None:
    at = rng.choice([2, *(at for at, _, _ in segments(content))])
    content[at:at] = b"\xff\xdd\0\4" + struct.pack(">H", rng.choice([0, 1, 2, 3, 5, 8, 20, rng.randrange(65536)]))


def change_the_restart_interval(rng: random.Random, content: bytearray) -> None:
    struct.pack_into(">H", content, one_of(rng, content, 0xDD)[0] + 4, rng.randrange(40))


def spoil_a_restart_marker(rng: random.Random, content: bytearray) -> None:
    start = scan_start(content)
    marks = [at for at in range(start, len(content) - 1) if content[at] == 0xFF and 0xD0 <= content[at + 1] <= 0xD7]
    at = rng.choice(marks)
    marker = bytes(content[at : at + 2])
    other = bytes((0xFF, 0xD0 + rng.randrange(8)))
    content[at : at + 2] = rng.choice([b"", other, marker * 2, b"\xff" + marker])


def swap_two_segments_of_data(rng: random.Random, content: bytearray) -> None:
    start = scan_start(content)
    marks = [at for at in range(start, len(content) - 1) if content[at] == 0xFF and 0xD0 <= content[at + 1] <= 0xD7]
    at = rng.randrange(len(marks) - 2)
    first, second, end = marks[at : at + 3]
    content[first + 2 : end] = content[second + 2 : end] + content[second : second + 2] + content[first + 2 : second]


def spoil_the_table(rng: random.Random, content: bytearray) -> None:
    """Changes the lengths of `add_restarts`: one, two whose sum stays, or their number."""
    at, _, size = one_of(rng, content, 0xEB)
    entries = (size - 9) // 2
    field = at + 11 + 2 * rng.randrange(entries - 1)
    first, second = struct.unpack_from(">HH", content, field)
    kind = rng.randrange(3)
    if kind == 0:
        struct.pack_into(">H", content, field, rng.randrange(65536))
    elif kind == 1:
        moved = rng.randrange(min(first, 20) + 1)
        struct.pack_into(">HH", content, field, first - moved, (second + moved) % 65536)
    else:
        struct.pack_into(">H", content, field + 2, (first + second + 2) % 65536)
        del content[field : field + 2]
        struct.pack_into(">H", content, at + 2, size - 2)


def take_another_files_table(rng: random.Random, content: bytearray) -> None:
    other = picture(4 * rng.randrange(PICTURES // 4) + 3)
    at, _, size = next(segment for segment in segments(other) if segment[1] == 0xEB)
    content[2:2] = other[at : at + 2 + size]


def insert_a_marker(rng: random.Random, content: bytearray) -> None:
    at = rng.randrange(scan_start(content), len(content))
    without_length = [b"\xff\xd9", b"\xff\xd0", b"\xff\x01", b"\xff\xda", b"\xff\0"]
    with_length = [b"\xff\xfe\0\4ab", b"\xff\xdd\0\4\0\2", b"\xff\xdc\0\4\0\x20"]
    content[at:at] = rng.choice(without_length + with_length)


def move_a_segment(rng: random.Random, content: bytearray) -> None:
    at, _, size = rng.choice(segments(content)[:-1])
    segment = bytes(content[at : at + 2 + size])
    if rng.random() < 0.5:
        del content[at : at + 2 + size]
    if rng.random() < 0.7:
        content[2:2] = segment


def append(rng: random.Random, content: bytearray) -> None:
    content += rng.choice([b"\xff\xd9", b"\xff\xd0\xff\xd9", rng.randbytes(60), picture(rng.randrange(PICTURES))])


def insert_an_application_segment(rng: random.Random, content: bytearray) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([rng.randrange(10)]) + bytes(7)
    marker, data = rng.choice(
        [
            (0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([rng.randrange(4)])),
            (0xE1, exif),
            (0xE1, b"Exif\0\0" + rng.randbytes(30)),
            (0xEB, b"mixmae\0" + rng.randbytes(20)),
        ]
    )
    content[2:2] = bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


MUTATIONS: list[Callable[[random.Random, bytearray], None]] = [
    flip_a_bit, change_a_header_byte, truncate, change_the_size, change_the_sampling, change_the_frame,
    insert_a_restart_interval, change_the_restart_interval, spoil_a_restart_marker, swap_two_segments_of_data,
    spoil_the_table, take_another_files_table, insert_a_marker, move_a_segment, append, insert_an_application_segment,
]  # fmt: skip


def mutated(number: int) -> bytes:
    rng = random.Random(number)
    content = bytearray(picture(rng.randrange(PICTURES)))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        with suppress(IndexError, ValueError, struct.error, StopIteration):  # a file without what is to be changed
            rng.choice(MUTATIONS)(rng, content)
    return bytes(content)


def check_file(number: int) -> str:
    """What became of one file; raises AssertionError for a wrong pixel."""
    content, rng = mutated(number), random.Random(-number)
    state = inspect_image(content)
    settings = Data()
    if state != JPEG:
        for claimed in (JPEG, PILLOW):  # by an index that is wrong
            with suppress(UnusableError):
                random_resized_crop(content, claimed, 32, settings, rng)
        return f"state {state}"
    source = PartialJpeg(content, jpeg.read_header(content))
    refused = False
    for _ in range(BOXES):
        box = sample_crop_box(source.width, source.height, (0.02, 1.0), rng)
        plan = plan_crop(box, source.width, source.height, 1, False, rng.choice([8, 16, 32, 224]))
        least = -(-source.height // plan.reduction), -(-source.width // plan.reduction)
        whole = simplejpeg.decode_jpeg(content, min_height=least[0], min_width=least[1])
        try:
            found = source.pixels(plan.box, plan.reduction)
        except ValueError:
            refused = True  # counted as damage, not shown
            continue
        left, upper, right, lower = (side // plan.reduction for side in plan.box)
        assert np.array_equal(found, whole[upper:lower, left:right]), f"file {number}: other pixels in {plan}"
    with suppress(UnusableError):
        random_resized_crop(content, state, 48, settings, rng)
    return "refused by the fast decoder" if refused else "good"


def check_batch(first: int, count: int, done: Connection) -> None:
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    try:
        for number in range(first, first + count):
            outcomes[check_file(number)] += 1
    except Exception as error:
        done.send(f"file {number}: {type(error).__name__}: {error}")
    else:
        done.send(outcomes)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_mutated_jpegs() -> None:
    outcomes = fuzz(0, FILES)
    assert outcomes.total() == FILES
    # The mutations reach the decoders, and damage is found by them.
    assert outcomes["good"] > FILES // 10
    assert outcomes["state 12"] > FILES // 20


@pytest.mark.services
def test_some_mutated_jpegs() -> None:
    assert fuzz(10**6, 400).total() == 400


def fuzz(first: int, files: int) -> Counter[str]:
    """Outcomes of files from a number on."""
    needs_jpegtran()
    for number in range(PICTURES):  # once, and not in each process
        picture(number)
    context = multiprocessing.get_context("fork")
    outcomes: Counter[str] = Counter()
    for start in range(first, first + files, BATCH):
        count = min(BATCH, first + files - start)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=check_batch, args=(start, count, theirs))
        process.start()
        theirs.close()
        where = f"files {start} to {start + count - 1}"
        assert ours.poll(SECONDS), f"{where}: nothing came back for {SECONDS:g} s"
        try:
            found = ours.recv()
        except EOFError:
            process.join()
            pytest.fail(f"{where}: the process ended with {process.exitcode}")
        process.join()
        assert isinstance(found, Counter), found
        outcomes += found
    return outcomes
