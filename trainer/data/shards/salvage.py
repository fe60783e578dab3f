"""Recovering the intact samples of a damaged shard: those that have an image and, where others have one, a label.

An index tells which images are unchanged and what their labels were, and it locates images whose names are lost.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mixmae.trainer.data.decode import inspect_image
from mixmae.trainer.data.faults import Reason
from mixmae.trainer.data.index import Table
from mixmae.trainer.data.shards.check import name_at
from mixmae.trainer.data.shards.scan import IMAGE_EXTENSIONS, Member, group, parse_label

_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}
_LABEL = "cls"


class LostSample(NamedTuple):
    """A sample that cannot be recovered."""

    shard: str
    sample: str
    reason: str


class Salvage:
    """Collects the intact samples of one shard."""

    def __init__(self, shard: str, content: Any, classes: int, indexed: Table) -> None:
        """
        Args:
            content: the tar's bytes.
            classes: number of known classes; 0: any label is fine.
            indexed: the shard's rows in the index, of usable samples.
        """
        self.samples: dict[str, dict[str, bytes]] = {}
        """Files by extension, by key."""
        self.states: dict[int, int] = {}
        """How images decode, by their hashes."""
        self.lost: list[LostSample] = []
        self._shard, self._content, self._classes = shard, content, classes
        self._rows = {(int(row["offset"]), int(row["size"])): row for row in indexed}

    def collect(self, found: Sequence[Member], is_damaged: bool) -> None:
        """Collects what is intact among the members that were found.

        Args:
            is_damaged: whether members may be missing: then a sample without a label, among others with one, lost it.
        """
        groups = group(found)
        needs_label = is_damaged and any(_LABEL in files for files in groups.values())
        for key, files in groups.items():
            self._collect_sample(key, files, needs_label)
        self._collect_unnamed({(member.offset, member.size) for member in found})

    def _collect_sample(self, key: str, files: dict[str, Member], needs_label: bool) -> None:
        images = {extension: file for extension, file in files.items() if extension in IMAGE_EXTENSIONS}
        if not images:
            self._lose(f"{key}.{next(iter(files))}", Reason.MISSING.label)
        whole = {extension: file for extension, file in images.items() if self._is_intact(f"{key}.{extension}", file)}
        if not whole:
            return
        label = self._label([(file.offset, file.size) for file in whole.values()], files.get(_LABEL))
        if label is None and (needs_label or _LABEL in files):
            reason = Reason.BAD_LABEL.label if _LABEL in files else "label lost"
            for extension in whole:
                self._lose(f"{key}.{extension}", reason)
            return
        others = {extension: file for extension, file in files.items() if extension not in (*images, _LABEL, "")}
        sample = {extension: self._bytes(file) for extension, file in (whole | others).items()}
        self.samples[key] = sample if label is None else {**sample, _LABEL: label}

    def _is_intact(self, name: str, file: Member) -> bool:
        image = self._bytes(file)
        image_hash, state = xxhash.xxh3_64_intdigest(image), inspect_image(image)
        row = self._rows.get((file.offset, file.size))
        if state >= min(Reason):
            self._lose(name, Reason(state).label)
        elif row is not None and row["hash"] != image_hash:
            self._lose(name, "other bytes than were indexed")
        else:
            self.states[image_hash] = state
            return True
        return False

    def _label(self, ranges: list[tuple[int, int]], file: Member | None) -> bytes | None:
        """The label's text: the indexed one, or that of the tar if it is one."""
        for position in ranges:
            if position in self._rows and self._rows[position]["label"] >= 0:
                return b"%d" % self._rows[position]["label"]
        if file is None or parse_label(self._bytes(file), self._classes) is None:
            return None
        return self._bytes(file)

    def _collect_unnamed(self, named: set[tuple[int, int]]) -> None:
        """Recovers intact images of the index whose tar header is damaged."""
        for (offset, size), row in self._rows.items():
            if (offset, size) in named:
                continue
            image = self._content[offset : offset + size]
            extension = next((name for start, name in _SIGNATURES.items() if image.startswith(start)), None)
            if xxhash.xxh3_64_intdigest(image) != row["hash"] or extension is None:
                self._lose(name_at(self._content, offset), "not found")
                continue
            label = {_LABEL: b"%d" % row["label"]} if row["label"] >= 0 else {}
            self.samples[f"{Path(self._shard).stem}-{offset}"] = {extension: image, **label}
            self.states[int(row["hash"])] = int(row["state"])

    def _bytes(self, file: Member) -> bytes:
        return bytes(self._content[file.offset : file.offset + file.size])

    def _lose(self, sample: str, reason: str) -> None:
        self.lost.append(LostSample(self._shard, sample, reason))
