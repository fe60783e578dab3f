"""Samples that cannot be used: why, how many, and when it is too many."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from trainer.errors import UsageError

JPEG, PILLOW = 0, 1
"""States of a good sample: a JPEG that libjpeg decodes without a warning, or anything else that Pillow decodes."""


class Reason(IntEnum):
    """Why a sample cannot be used. Values stand in indices: once given, they stay."""

    EMPTY = 10
    MISSING = 11
    """A sample with a label or other members, but without an image."""
    DAMAGED = 12
    NOT_AN_IMAGE = 13
    TOO_LARGE = 14
    BAD_LABEL = 15
    SHARD_GONE = 20
    SHARD_CUT = 21
    CHANGED = 22
    """Other bytes than were indexed."""
    STALLED = 23
    UNREADABLE = 24

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


class Fault(NamedTuple):
    """One unusable sample, and the epoch in which it was met."""

    epoch: int
    sample: int
    reason: Reason
    detail: str


class UnusableError(ValueError):
    """A sample's content cannot be used."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class TooManyFaultsError(UsageError):
    """More unusable samples than the recipe allows: the data failed, not the call."""

    exit_code = 1


class Tally:
    """What a rank met: counts by reason, one line for each name, and the end of the run above the allowed share."""

    CONSOLE_LINES = 10

    def __init__(self, allowed: float, record: Path | None = None) -> None:
        """
        Args:
            allowed: unusable samples in one epoch that the run survives.
            record: JSON lines file that names each unusable sample once.
        """
        self.allowed = allowed
        self.record = record
        self.counts: Counter[Reason] = Counter()
        self._named: set[int] = set()
        self._epoch = -1
        self._in_epoch: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, fault: Fault, shard: str, name: str) -> None:
        """Counts a fault.

        Raises:
            TooManyFaultsError: this epoch's faults exceed what is allowed.
        """
        if fault.epoch > self._epoch:
            self._epoch, self._in_epoch = fault.epoch, Counter()
        self.counts[fault.reason] += 1
        self._in_epoch[shard] += 1
        if fault.sample not in self._named:
            self._named.add(fault.sample)
            self._name(fault, name)
        if self._in_epoch.total() > self.allowed:
            raise TooManyFaultsError(
                f"{self._in_epoch.total()} samples of epoch {self._epoch} could not be used "
                f"({describe(self.counts)}), more than the {self.allowed:.4g} that data.max_bad_share allows a rank; "
                f"shards: {_most(self._in_epoch)}; see 'mixmae shards check', or raise data.max_bad_share"
            )

    def _name(self, fault: Fault, name: str) -> None:
        if self.record is not None:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            line = {"sample": name, "reason": fault.reason.label, "detail": fault.detail, "epoch": fault.epoch}
            with self.record.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if len(self._named) <= self.CONSOLE_LINES:
            last = f" (further ones only in {self.record})" if len(self._named) == self.CONSOLE_LINES else ""
            print(f"replaced {name}: {fault.reason.label}: {fault.detail}{last}", file=sys.stderr, flush=True)


def describe(counts: Counter[Reason]) -> str:
    """`3 damaged, 1 empty`."""
    return ", ".join(f"{count} {reason.label}" for reason, count in counts.most_common())


def _most(shards: Counter[str], shown: int = 5) -> str:
    names = [f"{name} ({count})" for name, count in shards.most_common(shown)]
    return ", ".join(names) + (f" and {len(shards) - shown} more" if len(shards) > shown else "")


def first_names(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
