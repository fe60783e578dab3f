"""The index of a shard directory: `index.json` (shards, counts, checksums) and `samples.npy` (image offsets).

Where samples have annotations beside their images, `annotations.npy` says where these are. With the
offsets a reader can start anywhere in a tar, and any position in an epoch is computed.
"""

import errno
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.trainer.data.annotations import ANNOTATION, ANNOTATIONS, AnnotationKind, Annotations
from mixmae.trainer.data.faults import ARRAY, JPEG, PILLOW, Reason, UnusableError, has_control_characters
from mixmae.trainer.data.no_shards import why_no_shards
from mixmae.trainer.data.order import Quota
from mixmae.trainer.data.stores.open_store import open_store
from mixmae.trainer.data.stores.store import Store, is_plain
from mixmae.trainer.recipe.sections.data import Cache, Network
from mixmae.trainer.recipe.sections.places import WeightedShards, places_of

INDEX, SAMPLES = "index.json", "samples.npy"
LOCATION = "location"
"""Key of `index.json`, where the index lies apart from its shards: their directory or URL."""
FORMAT, ANNOTATED_FORMAT = 2, 3
SAMPLE = np.dtype(
    [("shard", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("hash", "<u8"), ("state", "u1")]
)
"""One sample: its shard's number, where its image's bytes start in the tar, how many they are, its class (or
`UNLABELLED`, `INVALID_LABEL`), their XXH3 checksum, and how they decode: `faults.JPEG`, `faults.PILLOW`,
`faults.ARRAY` or a `faults.Reason`."""
UNLABELLED = -1
INVALID_LABEL = -2
"""There is a label, but it is neither a class number nor a class name."""
Table = npt.NDArray[Any]
_ROWS = 2**20
"""Rows that are checked at once: a table may be larger than memory."""
_STATES = np.array([JPEG, PILLOW, ARRAY, *Reason])
_MAPPED = 64 * 2**20
"""Bytes of a sample table from which on the processes of a node share its pages. A smaller one is read into memory,
where another program that truncates the file does not reach it."""


class Shard(NamedTuple):
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """A shard directory, opened."""

    store: Store
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    samples: Table
    """Rows of `SAMPLE`."""
    fingerprint: str
    """Identifies the images, their annotations and their order: equal fingerprints mean equal data."""
    annotations: AnnotationKind | None = None
    """What samples have beside their images."""
    annotation_table: Table | None = None
    """Rows of `ANNOTATION`, one a sample; None without annotations."""
    category_ids: tuple[int, ...] = ()
    """COCO's number of each class, where the objects came from a COCO file; its result files name classes by them."""
    quotas: tuple[Quota, ...] = ()
    """What an epoch takes of each of several directories; empty for one."""

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, sample: int) -> bytes:
        """The bytes of one image, as they were when it was indexed.

        Raises:
            UnusableError: why they cannot be read.
        """
        row = self.samples[sample]
        return self._read_verified(int(row["shard"]), row)

    def read_annotation(self, sample: int) -> bytes:
        """The bytes of a sample's annotation, as they were when it was indexed.

        Raises:
            UnusableError: why they cannot be read, or what is wrong with them.
        """
        assert self.annotation_table is not None, "shards without annotations"
        return self._read_verified(int(self.samples["shard"][sample]), self.annotation_table[sample])

    def _read_verified(self, shard_number: int, row: Any) -> bytes:
        """The bytes that a row of `SAMPLE` or `ANNOTATION` locates."""
        if row["state"] >= min(Reason):
            raise UnusableError(Reason(row["state"]), "found when the shards were indexed")
        shard, offset, size = self.shards[shard_number], int(row["offset"]), int(row["size"])
        for last in (False, True):
            content = self._read(shard, offset, size)
            if xxhash.xxh3_64_intdigest(content) == row["hash"]:
                return content
            if not last:  # a damaged copy in the cache, perhaps
                self.store.forget(shard.name, offset, size)
        raise UnusableError(Reason.CHANGED, f"other bytes in {shard.name} than were indexed")

    def _read(self, shard: Shard, offset: int, size: int) -> bytes:
        try:
            return self.store.read(shard.name, offset, size)
        except FileNotFoundError as error:
            raise UnusableError(Reason.SHARD_GONE, f"{shard.name} is gone") from error
        except TimeoutError as error:
            raise UnusableError(Reason.STALLED, str(error)) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UsageError(str(error)) from error  # the cache's disk, not the shard
            raise UnusableError(self._reason_of_failure(shard, offset + size), str(error)) from error

    def _reason_of_failure(self, shard: Shard, end: int) -> Reason:
        try:
            return Reason.SHARD_CUT if self.store.size(shard.name) < end else Reason.UNREADABLE
        except OSError:
            return Reason.UNREADABLE

    def name_of(self, sample: int) -> str:
        """`shard: member` of a sample, read from the tar's header; for messages."""
        row = self.samples[sample]
        shard, offset = self.shards[row["shard"]].name, int(row["offset"])
        try:
            header = self.store.read(shard, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
            return f"{shard}: {tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name}"
        except (OSError, tarfile.TarError):  # the shard itself is gone or damaged: the offset has to do for a name
            return f"{shard}: offset {offset}"

    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """The shards' bytes as they are now; -1 where one is missing or out of reach.

        Of those behind a URL what they were when they were indexed: of them only reading tells.
        """
        with ThreadPoolExecutor(16) as pool:
            return np.array(list(pool.map(self._size_now, self.shards)), dtype=np.int64)

    def _size_now(self, shard: Shard) -> int:
        try:
            return self.store.size(shard.name) if self.store.is_local(shard.name) else shard.bytes
        except OSError:
            return -1

    def listing(self) -> dict[str, Any]:
        """What identifies the data, for a run to record."""
        shares = {"shares": self._shares} if self.quotas else {}
        return {"fingerprint": self.fingerprint, "shards": [shard._asdict() for shard in self.shards], **shares}

    @property
    def _shares(self) -> list[int]:
        """Samples that an epoch takes of each of several directories."""
        return [quota.samples for quota in self.quotas]

    def first_difference(self, earlier: dict[str, Any]) -> str:
        """How this directory first differs from an earlier `listing`."""
        try:
            before = [Shard(**shard) for shard in earlier["shards"]]
        except (KeyError, TypeError):
            return f"fingerprint {self.fingerprint[:12]}, then {str(earlier.get('fingerprint'))[:12]}"
        for then, now in zip(before, self.shards, strict=False):
            for field in Shard._fields:
                if (a := getattr(then, field)) != (b := getattr(now, field)):
                    return (
                        f"{then.name} had {field}={a}, now {f'{now.name} with ' if field == 'name' else ''}{field}={b}"
                    )
        if len(before) != len(self.shards):
            return f"{len(before)} shards then, {len(self.shards)} now"
        if (shares := earlier.get("shares", [])) != self._shares:
            return f"an epoch took {shares} images of its places then, {self._shares} now"
        return "equal shards, indexed with other class names or other versions of the decoders"


def open_index(
    location: str | Path | Sequence[WeightedShards], network: Network | None = None, cache: Cache | None = None
) -> ShardIndex:
    """Reads the index of a directory or URL, of the shards that a brace pattern names, or of a list of such places.

    Raises:
        UsageError: no directory, no index, a damaged one, no samples; a pattern of shards that it does not list.
    """
    from mixmae.trainer.data.joined_index import join, select_shards

    places = places_of(location)
    indices = [open_directory(place.location, network, cache) for place in places]
    chosen = [
        index if place.names is None else select_shards(index, place.names)
        for place, index in zip(places, indices, strict=True)
    ]
    return join(places, chosen)


def open_directory(location: str, network: Network | None = None, cache: Cache | None = None) -> ShardIndex:
    """Reads the index of one directory or URL; errors as `open_index`."""
    store = open_store(location, network or Network(), cache or Cache())
    if store.directory is not None and not store.directory.is_dir():
        raise UsageError(
            f"shard directory {location} {what_is(store.directory)}; make one with 'mixmae shards build SRC {location}'"
            f" or 'mixmae shards synth {location}'"
        )
    local = store.directory is not None
    again = f"run 'mixmae shards index {location}'" if local else "index it where it is local, and upload it"
    try:
        content = json.loads(store.read_whole(INDEX))
        if (format_ := dict(content).get("format")) not in (FORMAT, ANNOTATED_FORMAT):
            expected = f"{FORMAT} or, with annotations, {ANNOTATED_FORMAT}"
            raise UsageError(f"{INDEX} of {location} has format {format_!r}, expected {expected}; {again}")
        samples = _read_table(store, SAMPLES, SAMPLE)
        annotations = _read_annotations(store, content["annotations"]) if format_ == ANNOTATED_FORMAT else None
        if LOCATION in content:
            store = _store_of_shards(location, content[LOCATION], network or Network(), cache or Cache())
        shards = tuple(Shard(**shard) for shard in content["shards"])
        classes, fingerprint = tuple(content["classes"]), content["fingerprint"]
        _require_types(shards, classes)
    except FileNotFoundError as error:
        folder = store.directory
        hint = again if folder is None or any(folder.glob("*.tar")) else why_no_shards(folder)
        raise UsageError(f"{location} has no {Path(str(error.filename or INDEX)).name}: {hint}") from error
    except UsageError:
        raise
    except Exception as error:  # JSON and NumPy raise many kinds of errors of what is damaged on purpose
        raise UsageError(f"the index of {location} is damaged or out of reach ({error}); {again}") from error
    if not len(samples):
        raise UsageError(f"the shards in {location} hold no images")
    if len(samples) != sum(shard.samples for shard in shards):
        raise UsageError(
            f"{SAMPLES} of {location} lists {len(samples)} images, {INDEX} {sum(s.samples for s in shards)}; {again}"
        )
    tables = f"{SAMPLES} and {ANNOTATIONS}" if annotations else SAMPLES
    if fingerprint_of(shards, classes, samples, annotations) != fingerprint:
        raise UsageError(f"{INDEX} and {tables} of {location} do not belong together; {again}")
    wrong = _contradiction(shards, samples) or (annotations and annotations.contradiction(samples, _sizes(shards)))
    if wrong is not None:
        raise UsageError(f"the index of {location} contradicts itself ({wrong}); {again}")
    return ShardIndex(store, shards, classes, samples, fingerprint, *(annotations or ()))


def _store_of_shards(index: str, location: Any, network: Network, cache: Cache) -> Store:
    """The store of the shards that an index apart from them names. Raises UsageError where they are not there."""
    if not isinstance(location, str) or not location:
        raise ValueError(f"the location of its shards is {location!r}")
    store = open_store(location, network, cache)
    if store.directory is not None and not store.directory.is_dir():
        raise UsageError(
            f"the index in {index} is of shards in {location}, which {what_is(store.directory)}; mount it, or run "
            f"'mixmae shards index DIR --output {index}' where they are now"
        )
    return store


def _require_types(shards: Sequence[Shard], classes: Sequence[str]) -> None:
    """Raises ValueError for values that JSON can hold and an index cannot."""
    for shard in shards:
        numbers = (shard.samples, shard.bytes)
        if not isinstance(shard.name, str) or has_control_characters(shard.name) or not is_plain(shard.name):
            raise ValueError(f"a shard is called {shard.name!r}; expected a name without folders")
        if not isinstance(shard.sha256, str):
            raise ValueError(f"{shard.name} has the checksum {shard.sha256!r}")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"{shard.name} has {shard.samples} samples and {shard.bytes} bytes")
    if not all(isinstance(name, str) for name in classes):
        raise ValueError("class names that are no text")


def _contradiction(shards: Sequence[Shard], samples: Table) -> str | None:
    """What makes a table unusable although its fingerprint fits; None if nothing does."""
    ends = np.cumsum([shard.samples for shard in shards])
    sizes = _sizes(shards)
    for first in range(0, len(samples), _ROWS):
        rows = samples[first : first + _ROWS]
        shard = np.searchsorted(ends, np.arange(first, first + len(rows)), side="right")
        for wrong, what in (
            (rows["shard"] != shard, f"is not in the shard that {INDEX} says"),
            (rows["offset"] < 0, "starts before its shard"),
            (rows["size"] < 0, "has a negative size"),
            (rows["offset"] > sizes[shard] - rows["size"], "ends behind its shard"),
            (~np.isin(rows["state"], _STATES), "has a state that is unknown here"),
            (rows["label"] < INVALID_LABEL, "has a negative label"),
        ):
            if wrong.any():
                return f"sample {first + int(np.flatnonzero(wrong)[0])} {what}"
    return None


def _sizes(shards: Sequence[Shard]) -> npt.NDArray[np.int64]:
    return np.array([shard.bytes for shard in shards], dtype=np.int64)


def fingerprint_of(
    shards: Sequence[Shard], classes: Sequence[str], samples: Table, annotations: Annotations | None = None
) -> str:
    """SHA-256 of everything in an index."""
    digest = hashlib.sha256(samples.tobytes())
    digest.update(json.dumps([shards, list(classes)]).encode())
    if annotations is not None:
        digest.update(annotations.table.tobytes())
        digest.update(json.dumps(annotations.describe()).encode())
    return digest.hexdigest()


def _read_annotations(store: Store, described: dict[str, Any]) -> Annotations:
    return Annotations.read(described, _read_table(store, ANNOTATIONS, ANNOTATION))


def _read_table(store: Store, name: str, dtype: np.dtype[Any]) -> Table:
    """A table of `dtype` rows. Raises ValueError for what is none."""
    if store.directory is not None and store.size(name) > _MAPPED:
        table: Table = np.load(store.directory / name, mmap_mode="r")
    else:
        table = np.load(io.BytesIO(store.read_whole(name)))
    if not isinstance(table, np.ndarray) or table.dtype != dtype or table.ndim != 1:
        raise ValueError(f"{name} is no table of samples")
    return table
