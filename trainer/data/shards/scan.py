"""A shard's tar file as a table of samples; also one that is damaged."""

import hashlib
import mmap
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from webdataset.tariterators import base_plus_ext

from mixmae.trainer.data.faults import Reason
from mixmae.trainer.data.index import SAMPLE, Shard, Table

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class DamagedTarError(ValueError):
    """A tar whose members cannot all be found; says at which byte."""


class Member(NamedTuple):
    """A file in a tar."""

    key: str
    extension: str
    offset: int
    size: int


def scan_shard(file: Path, inspect_image: Callable[[bytes], int], classes: int = 0) -> tuple[Shard, Table]:
    """Counts, checksums and the table (with shard number 0) of one shard.

    Args:
        judge: says how an image's bytes decode (`decode.judge`).
        classes: number of known classes; labels outside of them make a sample unusable. 0: any label is fine.

    Raises:
        DamagedTarError: not an uncompressed tar, or one whose members cannot all be found.
    """
    if not file.stat().st_size:
        raise DamagedTarError("it is empty")
    with mapped(file) as content:
        table = tabulate(list(members(file)), content, inspect_image, classes)
        return Shard(file.name, len(table), len(content), hashlib.sha256(content).hexdigest()), table


@contextmanager
def mapped(file: Path) -> Iterator[Any]:
    """A file's bytes, memory-mapped."""
    with file.open("rb") as stream:
        if file.stat().st_size == 0:  # which mmap does not take
            yield b""
            return
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


def members(file: Path) -> Iterable[Member]:
    """The files of a tar that belong to samples, in order.

    Raises:
        DamagedTarError: the tar ends early, or a header is damaged: tarfile alone would silently stop there.
    """
    try:
        with tarfile.open(file, "r:") as tar:
            for info in tar:
                yield from _member(info)
            end = tar.offset
    except (OSError, tarfile.TarError) as error:
        with file.open("rb") as stream:
            compression = _COMPRESSIONS.get(stream.read(2))
        raise DamagedTarError(f"it is compressed with {compression}" if compression else str(error)) from error
    with file.open("rb") as stream:
        stream.seek(end)
        rest = stream.read()
    if rest.count(0) != len(rest):
        raise DamagedTarError(f"no valid header at byte {end}")
    if len(rest) < 2 * _BLOCK:
        raise DamagedTarError(f"it ends at byte {end} without the mark that ends a tar; it may have been cut there")


def recover_members(file: Path) -> list[Member]:
    """The intact members that can be found in a tar, whatever is damaged between them."""
    size, at = file.stat().st_size, 0
    found: list[Member] = []
    with file.open("rb") as stream:
        while at < size:
            stream.seek(at)
            try:
                with tarfile.open(fileobj=stream, mode="r:", ignore_zeros=True) as tar:
                    for info in tar:
                        found += [member for member in _member(info) if member.offset + member.size <= size]
                        at = info.offset_data
                return found
            except tarfile.TarError:
                at += _BLOCK  # a damaged extended header: continue behind it
    return found


def _member(info: tarfile.TarInfo) -> Iterable[Member]:
    key, extension = base_plus_ext(info.name)
    # As webdataset: a name without a dot is no part of a sample, __name__ is about the shard.
    about_shard = "/" not in info.name and info.name.startswith("__") and info.name.endswith("__")
    if info.isfile() and key and not about_shard:
        yield Member(key, extension.lower(), info.offset_data, info.size)


def tabulate(files: Sequence[Member], content: Any, inspect_image: Callable[[bytes], int], classes: int = 0) -> Table:
    """The sample table of a tar's members, in the order in which the images stand."""
    rows = []
    for members_of in group(files).values():
        label = label_of(members_of, content, classes)
        images = [member for member in members_of.values() if member.extension in IMAGE_EXTENSIONS]
        known = -1 if label is None else label
        for member in images:
            image = content[member.offset : member.offset + member.size]
            state = Reason.BAD_LABEL if label is None else inspect_image(image)
            rows.append((0, member.offset, member.size, known, xxhash.xxh3_64_intdigest(image), state))
        if not images:
            rows.append((0, next(iter(members_of.values())).offset, 0, known, 0, Reason.MISSING))
    return np.array(sorted(rows, key=itemgetter(1)), dtype=SAMPLE)


def label_of(files: dict[str, Member], content: Any, classes: int) -> int | None:
    """A sample's class, -1 without one, None where its label is invalid."""
    if "cls" not in files:
        return -1
    member = files["cls"]
    return parse_label(content[member.offset : member.offset + member.size], classes)


def parse_label(text: bytes, classes: int) -> int | None:
    """A class number, or None where the text is not one."""
    try:
        label = int(text)
    except ValueError:
        return None
    in_range = 0 <= label < (classes or 2**31)
    return label if in_range else None


def group(found: Sequence[Member]) -> dict[str, dict[str, Member]]:
    """Members by key and extension; a second sample with the same key becomes `KEY-2`."""
    groups: dict[str, dict[str, Member]] = {}
    for member in found:
        key, number = member.key, 1
        while member.extension in groups.setdefault(key, {}):
            number += 1
            key = f"{member.key}-{number}"
        groups[key][member.extension] = member
    return groups
