"""What new shards are made of: the contract of a source, and the keys of its samples."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

from mixmae.trainer.data.annotations import AnnotationKind
from mixmae.trainer.data.faults import Reason, UnusableError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Entry(NamedTuple):
    """A sample to be written."""

    key: str
    """WebDataset's, unique in its source."""
    reference: Any
    """How its source finds it; JSON-serialisable."""
    size: int
    """Bytes of the image: exact, except for synthetic images."""
    label: int
    """-1: none."""
    annotation_size: int = 0
    """Bytes of the annotation: exact, except for synthetic images."""


class Source(Protocol):
    """Samples that can be read in any order and in any process; picklable."""

    entries: list[Entry]
    classes: list[str]
    annotations: AnnotationKind | None = None
    """What samples have beside their images."""
    category_ids: Sequence[int] = ()
    """COCO's numbers of the classes."""
    left_out: Sequence[tuple[str, str]] = ()
    """Names and reasons of files that are no samples."""

    def read(self, entry: Entry) -> tuple[str, bytes]:
        """The image's extension and bytes.

        Raises:
            OSError: they cannot be read.
            UnusableError: the sample has no image, or its label is invalid.
        """

    def annotation(self, entry: Entry, image: bytes) -> bytes:
        """The bytes of the sample's annotation; called where the source has some.

        Args:
            image: what `read` gave.

        Raises:
            OSError: they cannot be read.
            UnusableError: the sample has none, or it does not fit the image.
        """
        raise UnusableError(Reason.MISSING_ANNOTATION, "a source without annotations")

    def locate(self, entry: Entry) -> str:
        """Where a user finds the sample, for messages."""

    def describe(self) -> str:
        """What the source is: equal for equal sources."""


def unique(keys: Iterable[str]) -> Iterator[str]:
    """The keys, made unique: repeated ones get the suffixes `-2`, `-3`, ..."""
    taken: set[str] = set()
    last: Counter[str] = Counter()
    for key in keys:
        own = key
        while own in taken:
            last[key] = max(2, last[key] + 1)
            own = f"{key}-{last[key]}"
        taken.add(own)
        yield own


def key_of(path: str) -> str:
    """The WebDataset key of a relative path."""
    readable = _CONTROL.sub("_", os.fsencode(path).decode("utf-8", "replace"))
    folders = [part for part in PurePosixPath(readable).parts[:-1] if part not in ("/", "..")]
    # A WebDataset key ends at the first dot of the file's name.
    return "/".join([*folders, PurePosixPath(readable).stem.replace(".", "_")])
