"""The annotations beside the images of one shard: where they stand, and what is wrong with them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import xxhash

from mixmae.base.errors import UsageError
from mixmae.trainer.data.annotations import ANNOTATED, EXTENSIONS, AnnotationKind, merge_kinds, missing_rows
from mixmae.trainer.data.decode import upright_size
from mixmae.trainer.data.dense.inspection import Inspection, inspect_annotation
from mixmae.trainer.data.dense.masks import require_mask_api
from mixmae.trainer.data.faults import Reason, is_usable
from mixmae.trainer.data.index import Table
from mixmae.trainer.data.shards.files import ShardBytes
from mixmae.trainer.data.shards.members import Member

_MAX_BYTES = 2**31 - 1
"""What the index can say of an annotation's size."""


class AnnotationFault(NamedTuple):
    """An annotation, or one of its objects, that cannot be used."""

    name: str
    """Of its image, with the object's id."""
    reason: Reason
    detail: str = ""


class ShardAnnotations(NamedTuple):
    """The annotations of one shard as the index will have them."""

    kind: AnnotationKind
    table: Table
    """Rows of `ANNOTATION`, one for each row of the shard's sample table."""
    highest: int
    """The highest class number."""
    faults: list[AnnotationFault]
    """Of whole annotations and of single objects."""


def annotation_kind(
    samples: Iterable[dict[str, Member]], kinds: Sequence[AnnotationKind] = tuple(EXTENSIONS)
) -> AnnotationKind | None:
    """The kind of a shard's annotations: that of the files beside other files.

    Args:
        samples: files by extension.
        kinds: to look for.

    Raises:
        UsageError: two kinds.
    """
    found = {kind for files in samples for kind in kinds if len(files) > 1 and EXTENSIONS[kind] in files}
    try:
        return merge_kinds(list(found))
    except ValueError as error:
        raise UsageError(f"shards with {error} files; expected one kind of annotation in a shard directory") from error


def missing_annotations(kind: AnnotationKind, images: Sequence[Member]) -> ShardAnnotations:
    """Those of a shard that has none, beside others that have."""
    faults = [AnnotationFault(image.name, Reason.MISSING_ANNOTATION) for image in images]
    return ShardAnnotations(kind, missing_rows(len(images)), -1, faults)


def annotations_of(
    kind: AnnotationKind,
    samples: Table,
    images: Sequence[Member],
    files: Sequence[Member | None],
    content: ShardBytes,
    num_classes: int,
    inspect: bool,
) -> ShardAnnotations:
    """Locates, and perhaps verifies, the annotations of a shard's samples.

    Args:
        samples: the shard's rows of `index.SAMPLE`.
        images: of the rows.
        files: the annotations of the rows, None where one is missing.
        num_classes: 0 where it is not known.
        inspect: whether they are read; without, each that is there has the state `ANNOTATED`.
    """
    if inspect and kind == "objects":
        require_mask_api()
    table, highest = missing_rows(len(samples)), -1
    faults = []
    for row, sample, image, file in zip(table, samples, images, files, strict=True):
        if file is None:
            faults.append(AnnotationFault(image.name, Reason.MISSING_ANNOTATION))
            continue
        row["offset"], row["size"], row["state"] = file.offset, min(file.size, _MAX_BYTES), ANNOTATED
        if not inspect:
            continue
        encoded = content[file.offset : file.offset + int(row["size"])]
        row["hash"] = xxhash.xxh3_64_intdigest(encoded)
        if is_usable(sample["state"]):
            found = _inspect(kind, encoded, content, image, num_classes)
            row["state"], highest = found.state, max(highest, found.highest)
            if found.state != ANNOTATED:
                faults.append(AnnotationFault(image.name, Reason(found.state), found.detail))
            faults += [AnnotationFault(f"{image.name}, object {one.id}", one.reason) for one in found.faulty]
    return ShardAnnotations(kind, table, highest, faults)


def _inspect(kind: AnnotationKind, encoded: bytes, content: ShardBytes, image: Member, num_classes: int) -> Inspection:
    height, width = upright_size(content[image.offset : image.offset + image.size])
    return inspect_annotation(kind, encoded, height, width, num_classes)
