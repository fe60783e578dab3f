"""The findings of a shard check, as a table, as JSON and as an exit code."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from mixmae.trainer.data.faults import Reason, first_names
from mixmae.trainer.data.shards.unused import Unused


class Kind(Enum):
    """Kinds of findings. The second value: what repairs it, or None for mere information."""

    INDEX = "no usable index", "index"
    SHARD_GONE = "missing shard", "index"
    SHARD_UNKNOWN = "shard not indexed", "index"
    SHARD_CHANGED = "other bytes than were indexed", "index"
    SHARD_UNREADABLE = "unreadable shard", "nothing"
    TAR = "damaged tar", "rewrite"
    IMAGE_LOST = "indexed image not found", "rewrite"
    IMAGE_CHANGED = "image with other bytes than were indexed", "rewrite"
    LABEL_CHANGED = "label other than was indexed", "rewrite"
    KEY_TWICE = "key twice in a shard", "rewrite"
    EMPTY = "empty image", "rewrite"
    MISSING = "sample without an image", "rewrite"
    DAMAGED = "damaged image", "rewrite"
    NOT_AN_IMAGE = "not an image", "rewrite"
    TOO_LARGE = "too large image", "rewrite"
    OTHER_PIXELS = "image of other channels or type", "rewrite"
    CODEC_MISSING = "image whose codec is not installed", "rewrite"
    FLOATING_POINT = "image with floating-point pixels", "rewrite"
    BAD_LABEL = "label that is no class", "rewrite"
    ANNOTATION_CHANGED = "annotation with other bytes than were indexed", "rewrite"
    MISSING_ANNOTATION = "missing annotation", "rewrite"
    DAMAGED_ANNOTATION = "damaged annotation", "rewrite"
    ANNOTATION_OF_ANOTHER_SIZE = "annotation of another size than its image", "rewrite"
    EMPTY_BOX = "object with an empty box", "rewrite"
    OUTSIDE_IMAGE = "object outside of its image", "rewrite"
    EMPTY_MASK = "object with an empty mask", "rewrite"
    DAMAGED_MASK = "object with a damaged mask", "rewrite"
    MEMBER_UNREADABLE = "member without content", "rewrite"
    UNUSED = "not used", None
    KEY_IN_SHARDS = "key in several shards", None
    SAME_IMAGE = "same image twice", None
    WARNING = "JPEG decoded with a warning", None

    def __init__(self, text: str, remedy: str | None) -> None:
        self.text, self.remedy = text, remedy


class Finding(NamedTuple):
    kind: Kind
    shard: str
    sample: str = ""
    detail: str = ""

    @property
    def location(self) -> str:
        location = f"{self.shard}: {self.sample}" if self.sample else self.shard
        return f"{location} ({self.detail})" if self.detail else location

    def as_dict(self) -> dict[str, str]:
        return {"finding": self.kind.text, "shard": self.shard, "sample": self.sample, "detail": self.detail}


def kind_of(reason: Reason) -> Kind:
    """The kind of finding for a sample's state."""
    return Kind[reason.name]


def of_unused(where: str, unused: Unused) -> Iterator[Finding]:
    """What no sample uses in a directory or a shard."""
    for reason, count in unused.counts.items():
        yield Finding(
            Kind.UNUSED, where, detail=f"{count} {reason}: {first_names(unused.examples[reason], count=count)}"
        )
    for name, reason in unused.unreadable:
        yield Finding(Kind.MEMBER_UNREADABLE, where, name, reason)


@dataclass(frozen=True)
class Report:
    """The result of checking a directory."""

    directory: Path
    shards: int
    samples: int
    bytes: int
    seconds: float
    findings: Sequence[Finding]

    @property
    def is_sound(self) -> bool:
        return all(finding.kind.remedy is None for finding in self.findings)

    def lines(self) -> list[str]:
        """The report for a reader: findings by kind, then totals."""
        counts = Counter(finding.kind for finding in self.findings)
        rows = []
        for kind in (kind for kind in Kind if counts[kind]):
            first = first_names([finding.location for finding in self.findings if finding.kind == kind])
            mark = "information" if kind.remedy is None else "fault"
            rows.append(f"  {mark:<11}  {kind.text:<40}  {counts[kind]:>7}  {first}")
        total = (
            f"{self.directory}: {self.samples} samples in {self.shards} shards, {self.bytes / 1e6:.1f} MB, "
            f"checked in {self.seconds:.1f} s"
        )
        return [*rows, total]

    def verdict(self) -> str:
        """The last line: sound, or what to do next."""
        if self.is_sound:
            return "sound"
        remedies = {finding.kind.remedy for finding in self.findings}
        if "rewrite" in remedies:
            return (
                f"not sound; 'mixmae shards check {self.directory} --repair' rewrites damaged shards with their intact "
                "samples; a run that was started on this directory will then refuse to continue, since its data changed"
            )
        if "index" in remedies:
            return (
                f"not sound: shards and index disagree; restore what is missing, or run 'mixmae shards index "
                f"{self.directory}' to index what there is (a run that was started on this directory will then refuse "
                "to continue)"
            )
        return "not sound: a shard cannot be read; check the disk and its permissions, then run the check again"

    def as_dict(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "sound": self.is_sound,
            "shards": self.shards,
            "samples": self.samples,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "findings": [finding.as_dict() for finding in self.findings],
        }
