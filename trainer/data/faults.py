"""Unusable samples: why, how many, and how many are too many."""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from mixmae.base import jsonl
from mixmae.base.errors import UsageError

JPEG, PILLOW, ARRAY = 0, 1, 2
"""States of a usable sample: a JPEG that libjpeg decodes without a warning, anything else that Pillow decodes, or an
array that Pillow does not: .npy, and TIFF of more channels or types (`arrays`)."""


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Reason(IntEnum):
    """Why a sample is unusable. Values are stored in indices: once given, they stay."""

    EMPTY = 10
    MISSING = 11
    """A sample with a label or other members, but without an image."""
    DAMAGED = 12
    NOT_AN_IMAGE = 13
    TOO_LARGE = 14
    BAD_LABEL = 15
    FLOATING_POINT = 18
    """Pixels of no known range."""
    SHARD_GONE = 20
    SHARD_CUT = 21
    CHANGED = 22
    """Other bytes than were indexed."""
    STALLED = 23
    UNREADABLE = 24
    MISSING_ANNOTATION = 30
    DAMAGED_ANNOTATION = 31
    ANNOTATION_OF_ANOTHER_SIZE = 32
    """A label map, or a mask, whose height and width are not the upright image's."""
    EMPTY_BOX = 33
    OUTSIDE_IMAGE = 34
    EMPTY_MASK = 35
    DAMAGED_MASK = 36
    OTHER_PIXELS = 40
    """Other channels, or another type, than the recipe says."""
    CODEC_MISSING = 41
    """A TIFF whose compression needs a package that is not installed."""

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


def is_usable(states: Any) -> Any:
    """Whether a sample's or an annotation's state, or each of an array, is no `Reason`."""
    return states < min(Reason)


UNREACHABLE = (Reason.SHARD_GONE, Reason.STALLED, Reason.UNREADABLE)
"""Reasons that concern a shard and not the sample: substitutes may well fail too."""


class Fault(NamedTuple):
    """One unusable sample, and the epoch in which it was found."""

    epoch: int
    sample: int
    reason: Reason
    detail: str
    shard: str
    name: str


class UnusableError(ValueError):
    """A sample's content cannot be used."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class OutOfMemoryError(UsageError):
    """The machine's memory does not suffice for an image, of which that says nothing."""

    exit_code = 1


class TooManyFaultsError(UsageError):
    """More unusable samples than the recipe allows: the data failed, not the call."""

    exit_code = 1


class FaultLog:
    """Counts a rank's unusable samples by reason and epoch, and names each of them once."""

    CONSOLE_LINES = 10

    def __init__(self, record: Path | None = None) -> None:
        """
        Args:
            record: JSON lines file that names each unusable sample once, over all starts of a run.
        """
        self.record = record
        self.counts: Counter[Reason] = Counter()
        self._by_epoch: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._named: set[str] = _names_in(record)
        self._shown = 0

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, fault: Fault) -> None:
        """Counts a fault."""
        self.counts[fault.reason] += 1
        self._by_epoch[fault.epoch][fault.shard] += 1
        if fault.name not in self._named:
            self._named.add(fault.name)
            self._log(fault)

    def of_epoch(self, epoch: int) -> Counter[str]:
        """This rank's faults of an epoch, by shard; forgets epochs that every stream has left."""
        for past in [e for e in self._by_epoch if e < epoch - 1]:
            del self._by_epoch[past]
        return self._by_epoch[epoch]

    def _log(self, fault: Fault) -> None:
        if self.record is not None:
            line = {"sample": fault.name, "reason": fault.reason.label, "detail": fault.detail, "epoch": fault.epoch}
            jsonl.append(self.record, line)
        self._shown += 1
        if self._shown <= self.CONSOLE_LINES:
            where = f" (further ones only in {self.record})" if self.record is not None else " (further ones not shown)"
            last = where if self._shown == self.CONSOLE_LINES else ""
            print(f"replaced {fault.name}: {fault.reason.label}: {fault.detail}{last}", file=sys.stderr, flush=True)


def _names_in(record: Path | None) -> set[str]:
    return {line["sample"] for line in jsonl.read(record, "sample")} if record is not None else set()


def too_many(by_shard: Counter[str], reasons: Counter[Reason], epoch: int, allowed: float) -> TooManyFaultsError:
    """The error that ends a run with too many unusable samples."""
    shards = [f"{name} ({count})" for name, count in by_shard.most_common()]
    return TooManyFaultsError(
        f"{by_shard.total()} samples of epoch {epoch} could not be used ({describe(reasons)} in all), more than the "
        f"{allowed:.4g} that data.max_corrupt_fraction allows; shards: {first_names(shards, 5)}; see 'mixmae shards "
        "check', or raise data.max_corrupt_fraction"
    )


def describe(counts: Counter[Reason]) -> str:
    """`3 damaged, 1 empty`."""
    return ", ".join(f"{count} {reason.label}" for reason, count in counts.most_common())


def first_names(names: Sequence[str], shown: int = 3, count: int | None = None) -> str:
    """`a, b, c and 5 more`; `count` names in all where `names` holds the first ones only."""
    count = len(names) if count is None else count
    more = f" and {count - shown} more" if count > shown else ""
    return ", ".join(map(printable, names[:shown])) + more


def printable(name: str) -> str:
    """A file's name for a terminal, which its control characters could otherwise command."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), name)


def has_control_characters(name: str) -> bool:
    return _CONTROL.search(name) is not None
