"""The index of a shard directory: `index.json` (shards, counts, checksums) and `samples.npy` (image offsets).

Where samples have annotations beside their images, `annotations.npy` says where these are. With the
offsets a reader can start anywhere in a tar, and any position in an epoch is computed.
"""

import errno
import hashlib
import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from mixmae.base.errors import UsageError
from mixmae.trainer.data.annotations import AnnotationKind, Annotations
from mixmae.trainer.data.faults import Reason, UnusableError, is_usable
from mixmae.trainer.data.order import Quota
from mixmae.trainer.data.stores.store import Store

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
        if not is_usable(row["state"]):
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

    def refusal(self, sample: int, error: UnusableError) -> UsageError:
        """What to raise where a sample that cannot be used is not to be replaced by another one."""
        return UsageError(f"{self.name_of(sample)} cannot be used: {error.reason.label}, {error}")

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
