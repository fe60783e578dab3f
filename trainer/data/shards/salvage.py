"""Recovering the intact samples of a damaged shard: those that have an image and, where others have one, a label.

An index tells which images are unchanged and what their labels were, and it locates images whose names are lost.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mixmae.trainer.data.annotations import ANNOTATED, EXTENSIONS, AnnotationKind
from mixmae.trainer.data.decode import upright_size
from mixmae.trainer.data.dense.inspection import inspect_annotation
from mixmae.trainer.data.dense.objects import without_faulty
from mixmae.trainer.data.faults import Reason, is_usable
from mixmae.trainer.data.index import INVALID_LABEL, UNLABELLED, Table
from mixmae.trainer.data.inspection import inspect_image
from mixmae.trainer.data.shards.annotated import annotation_kind
from mixmae.trainer.data.shards.files import ShardBytes
from mixmae.trainer.data.shards.labels import LabelCodes, is_name
from mixmae.trainer.data.shards.members import Member, name_at
from mixmae.trainer.data.shards.scan import (
    LABEL,
    MAX_FILE_BYTES,
    beside_image,
    encode_label,
    group,
    images_of,
    label_of,
)

_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


class LostSample(NamedTuple):
    """A sample that cannot be recovered."""

    shard: str
    sample: str
    reason: str


class Salvage:
    """Collects the intact samples of one shard."""

    def __init__(
        self,
        shard: str,
        content: ShardBytes,
        classes: Sequence[str],
        indexed: Table,
        kinds: Sequence[AnnotationKind],
        annotations: Mapping[int, Any],
        labels_are_numbers: bool = False,
    ) -> None:
        """
        Args:
            content: the tar's bytes.
            classes: names of the labels 0, 1, ... as far as they are known.
            indexed: the shard's rows in the index, of usable samples.
            kinds: of annotations that samples may have.
            annotations: the rows of their annotations, by the offsets of the images.
            labels_are_numbers: whether a label that is a name is no class.
        """
        self.samples: dict[str, dict[str, bytes]] = {}
        """Files by extension, by key."""
        self.states: dict[int, int] = {}
        """How images decode, by their hashes."""
        self.lost: list[LostSample] = []
        self.lost_labels: list[LostSample] = []
        """Samples that are kept without their labels."""
        self._shard, self._content, self._classes = shard, content, classes
        self._labels_are_numbers = labels_are_numbers
        self._kinds, self._annotations = kinds, annotations
        self._kind: AnnotationKind | None = None
        self._rows = {(int(row["offset"]), int(row["size"])): row for row in indexed}
        labels = {(int(row["offset"]), int(row["size"]), int(row["label"])) for row in indexed}
        # Where a tar has links, two samples of one image may differ in their labels.
        self._ambiguous = {place for place, count in Counter(label[:2] for label in labels).items() if count > 1}

    def collect(self, found: Sequence[Member], is_damaged: bool) -> None:
        """Collects what is intact among the members that were found.

        Args:
            is_damaged: whether members may be missing: then a sample without a label, among others with one, lost it.
        """
        groups = group(found)
        self._kind = annotation_kind(groups.values(), self._kinds) or (self._kinds[0] if self._annotations else None)
        has_labels = is_damaged and any(LABEL in files for files in groups.values())
        for key, files in groups.items():
            self._collect_sample(key, files, has_labels)
        self._collect_unnamed({(member.offset, member.size) for member in found})

    def _collect_sample(self, key: str, files: dict[str, Member], has_labels: bool) -> None:
        images = images_of({extension: file for extension, file in files.items() if extension != self._label_map})
        if not images:
            for extension in files:
                self._lose(f"{key}.{extension}", Reason.MISSING.label)
        intact = [image for image in images if self._is_intact(f"{key}.{image.extension}", image)]
        if not intact:
            return
        used = {image.extension for image in images}
        beside: dict[str, bytes] = {}
        if self._kind is not None:
            beside, intact = self._annotate(key, files, intact)
            if not intact:
                return
        sample = beside | {image.extension: self._bytes(image) for image in intact}
        for image in intact:
            file = label_of(files, image)
            name = file.extension if file is not None else LABEL
            used.add(name)
            label = self._label(image, file)
            if label is not None:
                sample[name] = label
            elif file is not None or has_labels:
                reason = "label that is no class" if file is not None else "label lost"
                self.lost_labels.append(LostSample(self._shard, f"{key}.{image.extension}", reason))
        others = {extension: self._bytes(file) for extension, file in files.items() if extension not in (*used, "")}
        self.samples[key] = others | sample

    @property
    def _label_map(self) -> str | None:
        """The extension of what is no image although it is a PNG."""
        return EXTENSIONS["segments"] if self._kind == "segments" else None

    def _annotate(
        self, key: str, files: dict[str, Member], images: Sequence[Member]
    ) -> tuple[dict[str, bytes], list[Member]]:
        """The annotations of intact images without their faulty objects, by extension, and the images that have one."""
        assert self._kind is not None
        beside, kept = {}, []
        for image in images:
            name, file = f"{key}.{image.extension}", beside_image(files, image, EXTENSIONS[self._kind])
            if file is None:
                self._lose(name, Reason.MISSING_ANNOTATION.label)
                continue
            annotation = self._usable_annotation(name, image, self._bytes(file))
            if annotation is not None:
                beside[file.extension] = annotation
                kept.append(image)
        return beside, kept

    def _usable_annotation(self, name: str, image: Member, content: bytes) -> bytes | None:
        """An annotation without its faulty objects; None, and the sample is lost, if it cannot be used."""
        assert self._kind is not None
        before = self._annotations.get(image.offset)
        size = upright_size(self._bytes(image))
        found = inspect_annotation(self._kind, content, *size, len(self._classes))
        if found.state != ANNOTATED:
            self._lose(name, Reason(found.state).label)
        elif before is not None and before["hash"] != xxhash.xxh3_64_intdigest(content):
            self._lose(name, "annotation with other bytes than were indexed")
        else:
            for one in found.faulty:
                self._lose(f"{name}, object {one.id}", one.reason.label)
            return without_faulty(content, found.faulty) if found.faulty else content
        return None

    def _is_intact(self, name: str, file: Member) -> bool:
        if file.size > MAX_FILE_BYTES:
            self._lose(name, Reason.TOO_LARGE.label)
            return False
        image = self._bytes(file)
        image_hash, state = xxhash.xxh3_64_intdigest(image), inspect_image(image)
        row = self._rows.get((file.offset, file.size))
        if not is_usable(state):
            self._lose(name, Reason(state).label)
        elif row is not None and row["hash"] != image_hash:
            self._lose(name, "other bytes than were indexed")
        else:
            self.states[image_hash] = state
            return True
        return False

    def _label(self, image: Member, file: Member | None) -> bytes | None:
        """The label's text: the indexed one, or that of the tar if it is one; None without."""
        place = image.offset, image.size
        row = self._rows.get(place)
        if row is not None and row["label"] > UNLABELLED and place not in self._ambiguous:
            return b"%d" % row["label"]
        label = encode_label(file, self._content, LabelCodes(self._classes))
        if file is None or label == INVALID_LABEL or (self._labels_are_numbers and is_name(label)):
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
            label = {LABEL: b"%d" % row["label"]} if row["label"] >= 0 else {}
            annotation = self._annotation_at(offset)
            if annotation is None:
                self._lose(name_at(self._content, offset), Reason.MISSING_ANNOTATION.label)
                continue
            self.samples[f"{Path(self._shard).stem}-{offset}"] = {extension: image, **label, **annotation}
            self.states[int(row["hash"])] = int(row["state"])

    def _annotation_at(self, image: int) -> dict[str, bytes] | None:
        """An image's indexed annotation by its extension; nothing without annotations, None if it is not intact."""
        if self._kind is None:
            return {}
        row = self._annotations.get(image)
        if row is None:
            return None
        content = self._content[int(row["offset"]) : int(row["offset"]) + int(row["size"])]
        return {EXTENSIONS[self._kind]: content} if xxhash.xxh3_64_intdigest(content) == row["hash"] else None

    def _bytes(self, file: Member) -> bytes:
        return self._content[file.offset : file.offset + file.size]

    def _lose(self, sample: str, reason: str) -> None:
        self.lost.append(LostSample(self._shard, sample, reason))
