"""JPEG files cut to the rows that a crop needs, without touching a coefficient.

A decoder reads a JPEG from its top. Rows below a crop need not be decoded: the header is told a smaller height
(`stop_below`). Rows above it need not be either where every row of blocks ends in a restart marker, as `add_restarts`
leaves them: the rows of the crop alone make a small JPEG (`cut_rows`). Inside the crop the pixels are bit for bit
those of the whole file.

Layout of the file: ITU-T T.81, annex B; the orientation: Exif 2.3, section 4.6.4.
"""

import re
import shutil
import struct
import subprocess
from functools import lru_cache
from typing import NamedTuple

from trainer.errors import UsageError

_START, _END = b"\xff\xd8", b"\xff\xd9"
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")


class Header(NamedTuple):
    """What a JPEG says before its pixels."""

    width: int
    height: int
    components: int
    height_at: int
    """Offset of the two bytes that hold the height."""
    unit_width: int
    unit_height: int
    """Pixels of a minimum coded unit (MCU): 8 or, where chroma is subsampled, 16 or more."""
    context: int
    """Rows of MCUs beyond a crop that its pixels depend on: chroma is interpolated from its neighbours."""
    one_scan: bool
    """Whether rows come one after another: baseline or extended, all components interleaved."""
    restart_interval: int
    scan_at: int
    """Offset of the first scan's coded data."""
    orientation: int
    """Exif's, 1 (upright) to 8."""


def is_jpeg(content: bytes) -> bool:
    return content[:3] == b"\xff\xd8\xff"


def read_header(content: bytes) -> Header:
    """Raises ValueError for bytes that are no JPEG or break off before its first scan."""
    if content[:2] != _START:
        raise ValueError("no JPEG")
    frame, sequential, restart, exif, at = None, False, 0, b"", 2
    try:
        while True:
            while content[at + 1] == 0xFF:  # fill bytes
                at += 1
            marker, size = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
            if content[at] != 0xFF or size < 2:
                raise ValueError(f"no JPEG marker at byte {at}")
            if marker == 0xDA:
                break
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                frame, sequential = at, marker in _SEQUENTIAL
            elif marker == 0xDD:
                restart = int.from_bytes(content[at + 4 : at + 6], "big")
            elif marker == 0xE1 and content[at + 4 : at + 10] == b"Exif\0\0":
                exif += content[at + 10 : at + 2 + size]  # a further segment goes on where the last one ended
            at += 2 + size
        if frame is None:
            raise ValueError("no frame header before the first scan")
        height, width, components = struct.unpack(">HHB", content[frame + 5 : frame + 10])
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
        context=int(down > 1),
        one_scan=sequential and in_scan == components,
        restart_interval=restart,
        scan_at=at + 2 + size,
        orientation=_orientation(exif),
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


class Rows(NamedTuple):
    """A JPEG of some rows of another one."""

    content: bytes
    height: int
    top: int
    """Which row of the whole image the first one is."""
    strict: bool
    """Whether a decoder's warnings mean damage: bytes are left over behind rows that were not cut out."""


def rows_of(content: bytes, header: Header, upper: int, lower: int) -> Rows:
    """A JPEG that holds at least the pixel rows `upper` to `lower` of another one, the fewest that are cheap to get."""
    if not header.one_scan:
        return Rows(content, header.height, 0, True)
    units = -(-header.height // header.unit_height)
    first = max(0, upper // header.unit_height - header.context)
    last = min(units, -(-lower // header.unit_height) + header.context)
    if last - first == units:
        return Rows(content, header.height, 0, True)
    if header.restart_interval == -(-header.width // header.unit_width):
        pieces = _pieces(content, header)
        if len(pieces) == units:
            return cut_rows(content, header, pieces, first, last)
    return stop_below(content, header, last)


def stop_below(content: bytes, header: Header, last: int) -> Rows:
    """The JPEG, saying that it ends after `last` rows of MCUs."""
    height = min(header.height, last * header.unit_height)
    return Rows(_with_height(content, header, height), height, 0, height == header.height)


def cut_rows(content: bytes, header: Header, pieces: list[tuple[int, int]], first: int, last: int) -> Rows:
    """The JPEG of the rows of MCUs `first` to `last`, each of which is a piece of the coded data."""
    top = first * header.unit_height
    height = min(header.height, last * header.unit_height) - top
    parts = [_with_height(content[: header.scan_at], header, height)]
    for place, (start, end) in enumerate(pieces[first:last]):
        if place:
            parts.append(bytes((0xFF, 0xD0 + (place - 1) % 8)))
        parts.append(content[start:end])
    parts.append(_END)
    return Rows(b"".join(parts), height, top, True)


def _pieces(content: bytes, header: Header) -> list[tuple[int, int]]:
    """Start and end of the coded data between restart markers."""
    marks = [match.start() for match in _RESTART.finditer(content, header.scan_at)]
    end = content.rfind(_END)
    return list(zip([header.scan_at, *(mark + 2 for mark in marks)], [*marks, end], strict=True))


def _with_height(content: bytes, header: Header, height: int) -> bytes:
    return content[: header.height_at] + height.to_bytes(2, "big") + content[header.height_at + 2 :]


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
    """The same JPEG, coefficient for coefficient, sequential, with a restart marker after every row of MCUs.

    Raises:
        ValueError: jpegtran could not read it.
    """
    command = [require_jpegtran(), "-copy", "all", "-optimize", "-restart", "1"]
    done = subprocess.run(command, input=content, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        raise ValueError(done.stderr.decode(errors="replace").strip() or f"jpegtran ended with {done.returncode}")
    return done.stdout
