"""A shard's tar file as a table of samples."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from mixmae.trainer.data.annotations import EXTENSIONS, AnnotationKind
from mixmae.trainer.data.extensions import DECODED_EXTENSIONS, IMAGE_EXTENSIONS
from mixmae.trainer.data.faults import Reason
from mixmae.trainer.data.index import SAMPLE, UNLABELLED, Shard, Table
from mixmae.trainer.data.shards.annotated import ShardAnnotations, annotation_kind, annotations_of
from mixmae.trainer.data.shards.files import ShardBytes, shard_bytes
from mixmae.trainer.data.shards.labels import LabelCodes
from mixmae.trainer.data.shards.members import DamagedTarError, Member, members
from mixmae.trainer.data.shards.unused import Unused

LABEL = "cls"
MAX_FILE_BYTES = 2**31 - 1
"""What the index can say of an image's size."""


class ScannedShard(NamedTuple):
    """One shard as the index will have it."""

    shard: Shard
    table: Table
    """With shard number 0, and labels as `LabelCodes` gives them."""
    class_names: Sequence[str] = ()
    """Those that the table's label codes stand for."""
    unused: Unused | None = None
    annotations: ShardAnnotations | None = None


def scan_shard(
    file: Path,
    inspect: Callable[[bytes], int],
    classes: Sequence[str] = (),
    kinds: Sequence[AnnotationKind] = tuple(EXTENSIONS),
) -> ScannedShard:
    """Counts, checksums, the sample table and the annotations of one shard.

    Args:
        inspect: says how an image's bytes decode (`inspection.inspect_image`).
        classes: names of the labels 0, 1, ... as far as they are known.
        kinds: of annotations that are looked for.

    Raises:
        DamagedTarError: not an uncompressed tar, or one whose members cannot all be found.
        OSError: it cannot be read, is not a regular file, or is truncated meanwhile.
    """
    unused = Unused()
    with shard_bytes(file) as content:
        if not len(content):
            raise DamagedTarError("it is empty")
        samples = SampleTable(members(file, unused), content, inspect, classes, kinds)
        samples.count_unused(unused)
        shard = Shard(file.name, len(samples.table), len(content), checksum(content))
        content.require_unchanged()
        return ScannedShard(shard, samples.table, samples.class_names, unused, samples.annotations)


def checksum(content: ShardBytes) -> str:
    digest = hashlib.sha256()
    for block in content.blocks():
        digest.update(block)
    return digest.hexdigest()


class SampleTable:
    """The table of a tar's samples, in the order in which their images stand, with the name of each row's member."""

    def __init__(
        self,
        found: Sequence[Member],
        content: ShardBytes,
        inspect: Callable[[bytes], int] | None,
        classes: Sequence[str],
        kinds: Sequence[AnnotationKind] = tuple(EXTENSIONS),
    ) -> None:
        """
        Args:
            inspect: says how an image's bytes decode. None: images are not read, and have neither state nor hash.
            classes: names of the labels 0, 1, ... as far as they are known.
            kinds: of annotations that are looked for.

        Raises:
            UsageError: samples with annotations of two kinds.
        """
        labels = LabelCodes(classes)
        self._groups = group(found)
        self._kind = annotation_kind(self._groups.values(), kinds)
        rows: list[tuple[tuple[int, int, int, int, int, int], Member]] = []
        beside: dict[int, Member | None] = {}
        for files in self._groups.values():
            images = self._images_of(files)
            for image in images:
                label = encode_label(label_of(files, image), content, labels)
                rows.append(((0, *_inspect_member(image, label, content, inspect)), image))
                beside[id(image)] = self._annotation_of(files, image)
            if not images:
                first = next(iter(files.values()))
                label = max(UNLABELLED, encode_label(files.get(LABEL), content, labels))
                rows.append(((0, first.offset, 0, label, 0, Reason.MISSING), first))
        rows.sort(key=lambda row: row[0][1])
        self.table = np.array([row for row, _ in rows], dtype=SAMPLE)
        self.members = [member for _, member in rows]
        self.class_names = labels.names
        self.annotations: ShardAnnotations | None = None
        if self._kind is not None:
            files_beside = [beside.get(id(member)) for member in self.members]
            self.annotations = annotations_of(
                self._kind, self.table, self.members, files_beside, content, len(classes), inspect is not None
            )

    def _images_of(self, files: dict[str, Member]) -> list[Member]:
        """A sample's images, among which its label map is none."""
        label_map = EXTENSIONS["segments"] if self._kind == "segments" else None
        return images_of({extension: member for extension, member in files.items() if extension != label_map})

    def _annotation_of(self, files: dict[str, Member], image: Member) -> Member | None:
        return beside_image(files, image, EXTENSIONS[self._kind]) if self._kind is not None else None

    def count_unused(self, unused: Unused) -> None:
        """Counts the members that are neither image, label nor annotation."""
        for files in self._groups.values():
            used = self._images_of(files)
            labels = [label_of(files, image) for image in used] or [files.get(LABEL)]
            labels += [self._annotation_of(files, image) for image in used]
            for member in files.values():
                if member in used or member in labels:
                    continue
                kind = member.extension.rpartition(".")[2]
                if kind in DECODED_EXTENSIONS:
                    reason = f"images of samples that have a .{used[0].extension} already"
                elif not used:
                    reason = f".{kind} files of samples without an image ({_readable()})"
                else:
                    reason = f".{kind} files"
                unused.add(reason, member.name)


def _readable() -> str:
    return ", ".join(f".{extension}" for extension in DECODED_EXTENSIONS)


def _inspect_member(
    image: Member, label: int, content: ShardBytes, inspect: Callable[[bytes], int] | None
) -> tuple[int, int, int, int, int]:
    """A row without its shard number."""
    if image.size > MAX_FILE_BYTES:  # and is not read, so that it cannot exhaust memory
        return image.offset, 0, label, 0, Reason.TOO_LARGE
    if inspect is None:
        return image.offset, image.size, label, 0, 0
    encoded = content[image.offset : image.offset + image.size]
    return image.offset, image.size, label, xxhash.xxh3_64_intdigest(encoded), inspect(encoded)


def images_of(files: dict[str, Member]) -> list[Member]:
    """A sample's images, by extension.

    The usual formats come first: beside a `.jpg` a `.seg.png` is no image of the sample. Only a sample without any of
    them is searched for other formats and for compound extensions, as names with dots give them (`0001.input.jpg`).
    """
    usual = [member for extension, member in files.items() if extension in IMAGE_EXTENSIONS]
    if usual:
        return usual
    return [member for extension, member in files.items() if extension.rpartition(".")[2] in DECODED_EXTENSIONS]


def label_of(files: dict[str, Member], image: Member) -> Member | None:
    """The file with an image's label."""
    return beside_image(files, image, LABEL)


def beside_image(files: dict[str, Member], image: Member, extension: str) -> Member | None:
    """What a sample has of an image: `0001.v2.cls` for `0001.v2.jpg` if there is one, else the sample's `.cls`."""
    prefix, dot, _ = image.extension.rpartition(".")
    return files.get(f"{prefix}{dot}{extension}", files.get(extension))


def encode_label(member: Member | None, content: ShardBytes, labels: LabelCodes) -> int:
    """A label as `LabelCodes.encode` gives it; UNLABELLED without a file."""
    if member is None:
        return UNLABELLED
    return labels.encode(content[member.offset : member.offset + min(member.size, 2**16)])


def group(found: Sequence[Member]) -> dict[str, dict[str, Member]]:
    """Members by key and extension; a second sample with the same key becomes `KEY-2`."""
    groups: dict[str, dict[str, Member]] = {}
    for member in found:
        key, number = member.key, 1
        while member.extension in groups.setdefault(key, {}):
            number += 1
            key = f"{member.key}-{number}"
        groups[key][member.extension] = member
    return groups
