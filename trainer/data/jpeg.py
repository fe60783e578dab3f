"""Lossless JPEG cropping: the smallest JPEG that a crop needs, with unchanged coefficients.

A decoder reads a JPEG from its top. What lies below a crop need not be decoded: the header is told a smaller height.
What lies above and beside it need not be either where the coded data has restart markers several times in each row, as
`add_restarts` leaves them: the segments that the crop touches make a small JPEG of their own. Inside the crop the
pixels are bit for bit those of the whole file.

Layout of the file: ITU-T T.81, annex B; the orientation: Exif 2.3, section 4.6.4.
"""

import re
import shutil
import struct
import subprocess
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mixmae.base.errors import UsageError

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
_START, _END, _SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_FRAMES = (*_SEQUENTIAL, _PROGRESSIVE)
_UNNAMED_SAMPLING = (1, 4)
"""4:4:1, which libjpeg-turbo decodes and simplejpeg has no name for."""
_RESTART = 0xD0
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_WITHOUT_LENGTH = (0x00, 0x01, *range(0xD0, 0xDA))
_TABLE, _NAME = 0xEB, b"mixmae\0"
"""The application segment (APP11) in which `add_restarts` lists the lengths of segments: a search takes long."""
_INTERVAL = 4
"""MCUs between two restart markers, at most: a crop decodes less than so many too many on either side."""


class Header(NamedTuple):
    """The header of a JPEG."""

    width: int
    height: int
    components: int
    height_at: int
    """Offset of the two bytes that hold the height."""
    unit_width: int
    unit_height: int
    """Pixels of a minimum coded unit (MCU): 8 or, where chroma is subsampled, 16 or more."""
    context: tuple[int, int]
    """MCUs beside and above or below a crop that its pixels depend on: subsampled chroma is interpolated."""
    fast: bool
    """Whether the fast decoder may see it: baseline, extended or progressive DCT (SOF0 to 2) with 8-bit samples.
    simplejpeg allocates the reduced size of any other kind too, but libjpeg-turbo reduces no lossless JPEG (SOF3): it
    writes the full size, over memory that is not its own."""
    one_scan: bool
    """Whether rows come one after another: baseline or extended, all components interleaved."""
    restart_interval: int
    scan_at: int
    """Offset of the first scan's coded data."""
    orientation: int
    """Exif's, 1 (upright) to 8."""
    lengths: bytes
    """Of the segments between restart markers, as `add_restarts` noted them; empty in other files."""


def count_scans(content: bytes) -> int:
    """The scans of a JPEG. A few hundred kilobytes can hold thousands, each of which passes over the whole image."""
    scans, at = 0, 2
    while found := _MARKER.search(content, at):
        marker, at = content[found.end() - 1], found.end()
        if marker == _END[1]:
            break  # what follows may be another file, such as a phone's video
        if marker not in _WITHOUT_LENGTH:
            at += int.from_bytes(content[at : at + 2], "big")
        scans += marker == _SCAN
    return scans


def is_jpeg(content: bytes) -> bool:
    return content[:3] == b"\xff\xd8\xff"


def read_header(content: bytes) -> Header:
    """Raises ValueError for bytes that are no JPEG or break off before its first scan."""
    if content[:2] != _START:
        raise ValueError("no JPEG")
    frame, kind, restart, exif, lengths, at = None, 0, 0, b"", b"", 2
    try:
        while True:
            while content[at] == content[at + 1] == 0xFF:  # fill bytes
                at += 1
            marker, size = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
            # Markers without a length belong behind the first scan: here libjpeg would step over them by two bytes and
            # read another frame header than this function, which would skip what looks like their length.
            if content[at] != 0xFF or size < 2 or marker in _WITHOUT_LENGTH:
                raise ValueError(f"no JPEG segment at byte {at}")
            if marker == _SCAN:
                break
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                if frame is not None:
                    raise ValueError("two frame headers before the first scan")
                frame, kind = at, marker
            elif marker == 0xDD:
                restart = int.from_bytes(content[at + 4 : at + 6], "big")
            elif marker == 0xE1 and content[at + 4 : at + 10] == b"Exif\0\0":
                exif += content[at + 10 : at + 2 + size]  # a further segment goes on where the last one ended
            elif marker == _TABLE and content[at + 4 : at + 4 + len(_NAME)] == _NAME:
                lengths = content[at + 4 + len(_NAME) : at + 2 + size]
            at += 2 + size
        if frame is None:
            raise ValueError("no frame header before the first scan")
        precision, height, width, components = struct.unpack(">BHHB", content[frame + 4 : frame + 10])
        sampling = [content[frame + 11 + 3 * i] for i in range(components)]
        in_scan = content[at + 4]
    except (IndexError, struct.error) as error:
        raise ValueError("the JPEG breaks off in its header") from error
    across, down = (max(s >> 4 for s in sampling), max(s & 15 for s in sampling)) if components > 1 else (1, 1)
    return Header(
        width=width,
        height=height,
        components=components,
        height_at=frame + 5,
        unit_width=8 * across,
        unit_height=8 * down,
        context=(int(across > 1), int(down > 1)),
        fast=kind in _FRAMES and precision == 8 and (across, down) != _UNNAMED_SAMPLING,
        one_scan=kind in _SEQUENTIAL and in_scan == components,
        restart_interval=restart,
        scan_at=at + 2 + size,
        orientation=_orientation(exif),
        lengths=lengths,
    )


def _orientation(tiff: bytes) -> int:
    """The orientation in an Exif segment's TIFF; 1 where it holds none that makes sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 1
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            tag, kind = struct.unpack_from(order + "HH", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112 and kind in (3, 4):
                (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), tiff, directory + 10 + 12 * entry)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # a cut Exif segment turns nothing
    return 1


class LosslessCrop(NamedTuple):
    """A JPEG of a part of another JPEG."""

    content: bytes | Bytes
    width: int
    height: int
    left: int
    """Where its first column and row lie in the whole image."""
    top: int
    strict: bool
    """Whether a decoder's warnings mean damage: bytes are left over where only the height was lowered."""


def lossless_crop(content: bytes, header: Header, box: tuple[int, int, int, int]) -> LosslessCrop:
    """The smallest JPEG that is cheap to get and holds a box (left, upper, right, lower) of another one."""
    whole = LosslessCrop(content, header.width, header.height, 0, 0, True)
    if not header.one_scan:
        return whole
    left, upper, right, lower = box
    across, down = -(-header.width // header.unit_width), -(-header.height // header.unit_height)
    columns = _units(left, right, header.unit_width, header.context[0], across)
    rows = _units(upper, lower, header.unit_height, header.context[1], down)
    interval = header.restart_interval
    if interval and across % interval == 0:
        starts, ends = _restart_segments(content, header)
        if len(starts) == down * across // interval:
            wanted = range(columns.start // interval, -(-columns.stop // interval))
            grid = (down, across // interval)
            return _join(content, header, starts.reshape(grid), ends.reshape(grid), wanted, rows)
    height = min(header.height, rows.stop * header.unit_height)
    if height == header.height:
        return whole
    return LosslessCrop(_with_size(content, header, header.width, height), header.width, height, 0, 0, False)


def _units(start: int, end: int, unit: int, context: int, count: int) -> range:
    """The MCUs, of `count`, that a range of pixels touches or depends on."""
    return range(max(0, start // unit - context), min(count, -(-end // unit) + context))


def _restart_segments(content: bytes, header: Header) -> tuple[Offsets, Offsets]:
    """Where the segments of coded data between restart markers start and end."""
    coded = np.frombuffer(content, np.uint8)
    markers = _listed_markers(coded, header)
    if markers is None:
        markers = _find_markers(coded, header)
    return np.concatenate([[header.scan_at], markers[:-1] + 2]), markers


def _listed_markers(coded: Bytes, header: Header) -> Offsets | None:
    """Where the markers are by the file's own table, and the image's end; None if it has none that fits the file.

    Another program may have re-encoded the image and kept the table: then no restart markers stand where it says.
    """
    lengths = np.frombuffer(header.lengths, ">u2")
    if not len(lengths):
        return None
    markers = header.scan_at - 2 + np.cumsum(lengths + np.int64(2))
    end = int(markers[-1])
    if coded[end : end + 2].tobytes() != _END:
        return None
    restarts = markers[:-1]
    counted = _RESTART + np.arange(len(restarts)) % 8
    fits = (coded[restarts] == 0xFF).all() and (coded[restarts + 1] == counted).all()
    return markers if fits else None


def _find_markers(coded: Bytes, header: Header) -> Offsets:
    scan = coded[header.scan_at :]
    escapes = np.flatnonzero(scan[:-1] == 0xFF)
    follows = scan[escapes + 1]
    return escapes[(follows & 0xF8 == _RESTART) | (follows == _END[1])] + header.scan_at


def _join(content: bytes, header: Header, starts: Offsets, ends: Offsets, columns: range, rows: range) -> LosslessCrop:
    """The JPEG of some columns of segments [rows, columns], in some rows of MCUs."""
    across = header.restart_interval * header.unit_width
    left, top = columns.start * across, rows.start * header.unit_height
    width = min(header.width, columns.stop * across) - left
    height = min(header.height, rows.stop * header.unit_height) - top
    ends = ends[rows.start : rows.stop, columns.start : columns.stop]
    firsts = starts[rows.start : rows.stop, columns.start]
    lengths = ends[:, -1] + 2 - firsts  # with the marker behind the row's last segment
    offsets = header.scan_at + np.cumsum(lengths) - lengths
    coded, joined = np.frombuffer(content, np.uint8), np.empty(header.scan_at + lengths.sum(), np.uint8)
    joined[: header.scan_at] = np.frombuffer(_with_size(content[: header.scan_at], header, width, height), np.uint8)
    for first, length, offset in zip(firsts.tolist(), lengths.tolist(), offsets.tolist(), strict=True):
        joined[offset : offset + length] = coded[first : first + length]
    # Markers count from 0 to 7 again and again, which a decoder checks; behind the last segment the image ends.
    markers = (ends + (offsets - firsts)[:, None]).ravel() + 1
    joined[markers] = _RESTART + np.arange(len(markers)) % 8
    joined[markers[-1]] = _END[1]
    return LosslessCrop(joined, width, height, left, top, True)


def _with_size(content: bytes, header: Header, width: int, height: int) -> bytes:
    at = header.height_at
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


@lru_cache(maxsize=1)
def require_jpegtran() -> str:
    """The path of jpegtran.

    Raises:
        UsageError: it is not installed.
    """
    program = shutil.which("jpegtran")
    if program is None:
        raise UsageError(
            "--seekable needs the program jpegtran; install it with 'apt-get install libjpeg-turbo-progs' "
            "or 'brew install jpeg-turbo'"
        )
    return program


def add_restarts(content: bytes) -> bytes:
    """The same JPEG, coefficient for coefficient, sequential, with restart markers after every few MCUs of each row.

    Raises:
        ValueError: the bytes are no JPEG, or jpegtran could not read them.
    """
    header = read_header(content)
    across = -(-header.width // header.unit_width)
    interval = next(n for n in range(_INTERVAL, 0, -1) if across % n == 0)
    command = [require_jpegtran(), "-copy", "all", "-optimize", "-restart", f"{interval}B"]
    done = subprocess.run(command, input=content, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        raise ValueError(done.stderr.decode(errors="replace").strip() or f"jpegtran ended with {done.returncode}")
    return _with_table(done.stdout)


def _with_table(content: bytes) -> bytes:
    """The JPEG with the lengths of its segments, as far as a segment holds them."""
    starts, ends = _restart_segments(content, read_header(content))
    table = _NAME + (ends - starts).astype(">u2").tobytes()
    if len(table) > 2**16 - 3 or (ends - starts).max() >= 2**16:
        return content
    return content[:2] + bytes((0xFF, _TABLE)) + (len(table) + 2).to_bytes(2, "big") + table + content[2:]
