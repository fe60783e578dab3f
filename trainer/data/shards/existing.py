"""A directory of shards to which further ones are added: its numbers of classes and its keys stay."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.trainer.data.faults import UnusableError, first_names
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.open_index import open_directory
from mixmae.trainer.data.shards.files import shard_files
from mixmae.trainer.data.shards.members import DamagedTarError, members
from mixmae.trainer.data.shards.scan import ScannedShard
from mixmae.trainer.data.shards.source import Entry, Source, unique
from mixmae.trainer.data.shards.workers import advance, run_jobs

_PART = 256
"""Images that a process compares at once."""
ALREADY_THERE = "already in the shards"
"""Why an image is not added again."""


@dataclass(frozen=True)
class Existing:
    """What is known of the shards that are there."""

    index: ShardIndex
    keys: list[str]
    hashes: npt.NDArray[np.uint64]
    """Of the images, sorted."""

    @classmethod
    def of(cls, directory: Path, is_unfinished: bool) -> "Existing":
        """
        Args:
            is_unfinished: an interrupted addition may have left shards that the index does not list.

        Raises:
            UsageError: no whole, local directory of shards with an index, or one with annotations.
        """
        index = open_directory(str(directory))
        if index.store.directory != directory:
            raise UsageError(f"--append: the shards of {directory} are in {index.store.location}; add to them there")
        if index.annotations is not None:
            raise UsageError(
                f"--append: the images in {directory} have {index.annotations} beside them; build new ones to a "
                "directory of their own, and name both in data.shards"
            )
        names = {shard.name for shard in index.shards}
        unlisted = [file.name for file in shard_files(directory) if file.name not in names]
        if unlisted and not is_unfinished:
            raise UsageError(
                f"--append: the index of {directory} does not list {first_names(unlisted)}; run 'mixmae shards index "
                f"{directory}' first"
            )
        return cls(index, _keys(directory, index), np.sort(index.samples["hash"]))

    @property
    def next_number(self) -> int:
        numbers = [int(stem) for shard in self.index.shards if (stem := Path(shard.name).stem).isdecimal()]
        return max(numbers, default=-1) + 1

    def holds(self, image: bytes) -> bool:
        """Whether an image with these bytes is there."""
        digest = np.uint64(xxhash.xxh3_64_intdigest(image))
        at = int(np.searchsorted(self.hashes, digest))
        return at < len(self.hashes) and bool(self.hashes[at] == digest)

    def continued_by(self, source: Source, jobs: int) -> tuple[Source, list[Entry]]:
        """The source with numbers of classes and keys that continue those that are there, and what it leaves out.

        It leaves out images that are there with the same bytes.

        Args:
            jobs: processes that read the source.

        Raises:
            UsageError: annotations, or labels that are numbers where those that are there have names, or the reverse.
        """
        if source.annotations is not None:
            raise UsageError("--append adds images without annotations; build these to a directory of their own")
        classes = list(self.index.classes)
        has_numbers = not classes and bool((self.index.samples["label"] >= 0).any())
        if source.classes and has_numbers:
            raise UsageError(
                f"--append: the labels in {self.index.store.location} are numbers without names, and the new ones are "
                f"names ({first_names(source.classes)}); list the new images with numbers, in a .csv"
            )
        highest = max((entry.label for entry in source.entries), default=-1)
        if classes and not source.classes and highest >= len(classes):
            raise UsageError(
                f"--append: label {highest}, but {self.index.store.location} has the {len(classes)} classes "
                f"{first_names(classes)}; expected names, or numbers below {len(classes)}"
            )
        numbers = list(range(highest + 1))
        if source.classes:
            classes += sorted(set(source.classes) - set(classes))
            numbers = [classes.index(name) for name in source.classes]
        new, repeated = self._divide(source, jobs)
        keys = list(unique([*self.keys, *(entry.key for entry in new)]))[len(self.keys) :]
        entries = [
            entry._replace(key=key, label=numbers[entry.label] if entry.label >= 0 else entry.label)
            for entry, key in zip(new, keys, strict=True)
        ]
        return _with(source, entries, classes), repeated

    def _divide(self, source: Source, jobs: int) -> tuple[list[Entry], list[Entry]]:
        """The source's entries that are not there, and those that are."""
        total = len(source.entries)
        parts = [range(first, min(first + _PART, total)) for first in range(0, total, _PART)]
        with tqdm(total=total, unit="image", desc="compare", disable=None) as bar:
            found = [is_there for part in run_jobs(_are_there, (self, source), parts, jobs, bar) for is_there in part]
        divided: tuple[list[Entry], list[Entry]] = ([], [])
        for entry, is_there in zip(source.entries, found, strict=True):
            divided[is_there].append(entry)
        return divided

    def scanned(self) -> Iterator[ScannedShard]:
        """The shards that are there, as the index has them."""
        ends = np.cumsum([shard.samples for shard in self.index.shards])
        for shard, table in zip(self.index.shards, np.split(np.array(self.index.samples), ends[:-1]), strict=True):
            yield ScannedShard(shard, table)


def _are_there(shared: tuple[Existing, Source], numbers: range) -> list[bool]:
    """Which of some entries are there; runs in a worker process. What cannot be read is not, and is told later."""
    existing, source = shared
    found = []
    for number in numbers:
        is_there = False
        with suppress(OSError, UnusableError):
            is_there = existing.holds(source.read(source.entries[number])[1])
        found.append(is_there)
        advance()
    return found


def _with(source: Any, entries: list[Entry], classes: list[str]) -> Source:
    return replace(source, entries=entries, classes=classes)


def _keys(directory: Path, index: ShardIndex) -> list[str]:
    """Those of all samples, from the tars' headers."""
    keys: dict[str, None] = {}
    for shard in index.shards:
        try:
            keys |= dict.fromkeys(member.key for member in members(directory / shard.name))
        except (OSError, DamagedTarError) as error:
            raise UsageError(
                f"--append: cannot read {directory / shard.name}: {error}; see 'mixmae shards check {directory}'"
            ) from error
    return list(keys)
