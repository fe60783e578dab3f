"""The members of a tar file; also of one that is damaged."""

import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from mixmae.base.files import open_regular
from mixmae.trainer.data.shards.files import ShardBytes
from mixmae.trainer.data.shards.unused import Unused, is_junk

_BLOCK = 512
_CHUNK = 2**20
_MAX_EXTENDED_HEADERS = 8
_VOLUME_LABEL = b"V"
"""Type of the entry that `tar --label` writes: the archive's name."""
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class DamagedTarError(ValueError):
    """A tar whose members cannot all be found; says at which byte."""


class Member(NamedTuple):
    """A file in a tar."""

    key: str
    extension: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.key}.{self.extension}"


def members(file: Path, unused: Unused | None = None) -> list[Member]:
    """The files of a tar that belong to samples, in order. Links are resolved within the tar.

    Args:
        unused: counts the tar's other files.

    Raises:
        DamagedTarError: the tar ends early, or a header is damaged: tarfile alone would silently stop there.
        OSError: it cannot be read, or is not a regular file.
    """
    collector, last = _Collector(unused), 0
    with open_regular(file) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:", tarinfo=_TarInfo) as tar:
                for info in _forward(tar):
                    last = info.offset
                    collector.add(info)
                end = tar.offset
        except (DamagedTarError, MemoryError):
            raise
        except Exception as error:  # tarfile raises ValueError, OverflowError and others of damaged extended headers
            stream.seek(0)
            compression = _COMPRESSIONS.get(stream.read(2))
            said = str(error) if isinstance(error, tarfile.TarError) else ""
            reason = f"it is compressed with {compression}" if compression else said
            raise DamagedTarError(reason or f"a header at byte {last} or behind is damaged") from error
        stream.seek(end)
        rest = 0
        while chunk := stream.read(_CHUNK):
            if chunk.count(0) != len(chunk):
                raise DamagedTarError(f"no valid header at byte {end}")
            rest += len(chunk)
    if rest < 2 * _BLOCK:
        raise DamagedTarError(f"it ends at byte {end} without the mark that ends a tar; it may have been cut there")
    return collector.members()


def recover_members(file: Path, unused: Unused | None = None) -> list[Member]:
    """The intact files that can be found in a tar, whatever is damaged between them. Raises OSError as `members`."""
    collector = _Collector(unused)
    at = 0
    with open_regular(file) as stream:
        size = stream.seek(0, 2)
        while at < size:
            stream.seek(at)
            try:
                with tarfile.open(fileobj=stream, mode="r:", tarinfo=_TarInfo, ignore_zeros=True) as tar:
                    for info in _forward(tar):
                        if info.offset_data + info.size <= size:
                            collector.add(info)
                        at = max(at, info.offset_data)
                break
            except Exception:  # a damaged extended header: continue behind it
                at += _BLOCK
    return collector.members()


def find_members(file: Path, unused: Unused) -> tuple[list[Member], DamagedTarError | None]:
    """A tar's members, and what is wrong with it; of a damaged tar the intact members.

    Args:
        unused: counts the tar's other files.

    Raises:
        OSError: it cannot be read.
    """
    found = Unused(most_examples=unused.most_examples)
    try:
        whole = members(file, found)
    except DamagedTarError as error:
        return recover_members(file, unused), error
    unused.merge(found)
    return whole, None


def name_at(content: ShardBytes, offset: int) -> str:
    """A member's name from its header, or its offset where the header is lost."""
    try:
        return tarfile.TarInfo.frombuf(content[offset - _BLOCK : offset], "utf-8", "replace").name
    except tarfile.TarError:
        return f"image at byte {offset}"


class _TarInfo(tarfile.TarInfo):
    """A header that follows a few extended headers at most: tarfile reads each of them one call deeper."""

    _depth = 0

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_TarInfo":
        cls._depth += 1
        try:
            if cls._depth > _MAX_EXTENDED_HEADERS:
                raise DamagedTarError(f"more than {_MAX_EXTENDED_HEADERS} extended headers before byte {tar.offset}")
            return super().fromtarfile(tar)
        finally:
            cls._depth -= 1


def _forward(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar. A negative size would lead tarfile back to where it was, for ever."""
    last = -1
    for info in tar:
        if info.size < 0 or info.offset <= last:
            raise DamagedTarError(f"the header at byte {info.offset} says a size of {info.size} bytes")
        last = info.offset
        yield info


class _Collector:
    """Sorts a tar's entries into members of samples and what is unused."""

    def __init__(self, unused: Unused | None) -> None:
        self._unused = unused if unused is not None else Unused()
        self._entries: list[tuple[str, tuple[int, int] | str]] = []
        """Name, and offset and size or, of a link, the name that it leads to."""
        self._contents: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}

    def add(self, info: tarfile.TarInfo) -> None:
        path = posixpath.normpath(info.name)
        if info.isdir() or info.type == _VOLUME_LABEL:
            return
        if info.issparse():
            self._unused.add_unreadable("sparse files, which are stored in pieces", info.name)
        elif info.isreg():
            self._contents[path] = info.offset_data, info.size
            self._entries.append((info.name, (info.offset_data, info.size)))
        elif info.islnk() or info.issym():
            folder = posixpath.dirname(path) if info.issym() else ""
            target = posixpath.normpath(posixpath.join(folder, info.linkname))
            self._links[path] = target
            self._entries.append((info.name, target))
        elif info.isdev():
            self._unused.add_unreadable("devices or FIFOs", info.name)
        else:
            self._unused.add_unreadable(
                f"entries of type {info.type.decode('latin-1')!r}, which hold no file", info.name
            )

    def members(self) -> list[Member]:
        found = []
        for name, content in self._entries:
            key, extension = base_plus_ext(name)
            if "/" not in name and name.startswith("__") and name.endswith("__"):
                self._unused.add("files about the shard (__NAME__)", name)  # as for webdataset
                continue
            if is_junk(name):
                self._unused.add("hidden files or folders", name)
                continue
            if not key:
                self._unused.add("files without an extension", name)
                continue
            place = self._resolve(content) if isinstance(content, str) else content
            if place is None:
                self._unused.add_unreadable("links to what is not in the tar", name)
            else:
                found.append(Member(key, extension.lower(), *place))
        return found

    def _resolve(self, path: str) -> tuple[int, int] | None:
        """Where the content of a link's target is; None if that is not in the tar."""
        for _ in range(len(self._links) + 1):
            if path in self._contents:
                return self._contents[path]
            if path not in self._links:
                return None
            path = self._links[path]
        return None  # a circle of links
