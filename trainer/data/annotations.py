"""What an index says of the annotations beside images: the part of `index.json` and the table `annotations.npy`."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from mixmae.trainer.data.faults import Reason

ANNOTATIONS = "annotations.npy"
ANNOTATION = np.dtype([("offset", "<i8"), ("size", "<i4"), ("hash", "<u8"), ("state", "u1")])
"""The annotation of the sample with the same number, in the same shard: where its bytes start, how many they are, their
XXH3 checksum, and `ANNOTATED` or why it cannot be used: a `faults.Reason`."""
ANNOTATED = 0
AnnotationKind = Literal["objects", "segments"]
"""Objects with boxes, classes and masks, as JSON; or a label map: the class of every pixel, as PNG."""
EXTENSIONS: dict[AnnotationKind, str] = {"objects": "objects.json", "segments": "seg.png"}
"""Of the file beside an image, behind the sample's key."""
_ROWS = 2**20
_STATES = np.array([ANNOTATED, *Reason])


class Annotations(NamedTuple):
    """The annotations of all samples."""

    kind: AnnotationKind
    table: npt.NDArray[Any]
    """Rows of `ANNOTATION`, one a sample."""
    category_ids: tuple[int, ...] = ()
    """COCO's number of each class, where the objects came from a COCO file; its result files name classes by them."""

    @classmethod
    def read(cls, described: dict[str, Any], table: npt.NDArray[Any]) -> "Annotations":
        """Those of a table, with what `describe` gave. Raises ValueError for what it cannot have given."""
        kind, ids = described["kind"], described["category_ids"]
        if kind not in get_args(AnnotationKind) or not all(type(number) is int for number in ids):
            raise ValueError(f"annotations of the kind {kind!r} with the category numbers {ids!r}")
        return cls(kind, table, tuple(ids))

    def describe(self) -> dict[str, Any]:
        """The part that `index.json` holds."""
        return {"kind": self.kind, "category_ids": list(self.category_ids)}

    def contradiction(self, samples: npt.NDArray[Any], shard_sizes: npt.NDArray[np.int64]) -> str | None:
        """What makes the table unusable although the index's fingerprint fits; None if nothing does."""
        if len(self.table) != len(samples):
            return f"{ANNOTATIONS} lists {len(self.table)} samples of {len(samples)}"
        for first in range(0, len(samples), _ROWS):
            rows, shard = self.table[first : first + _ROWS], samples["shard"][first : first + _ROWS]
            for wrong, what in (
                (rows["offset"] < 0, "starts before its shard"),
                (rows["size"] < 0, "has a negative size"),
                (rows["offset"] > shard_sizes[shard] - rows["size"], "ends behind its shard"),
                (~np.isin(rows["state"], _STATES), "has a state that is unknown here"),
            ):
                if wrong.any():
                    return f"the annotation of sample {first + int(np.flatnonzero(wrong)[0])} {what}"
        return None


def missing_rows(count: int) -> npt.NDArray[Any]:
    """Rows of `ANNOTATION` that say that there is none."""
    table = np.zeros(count, ANNOTATION)
    table["state"] = Reason.MISSING_ANNOTATION
    return table


def merge_kinds(kinds: Sequence[AnnotationKind | None]) -> AnnotationKind | None:
    """The kind that all shards with annotations have. Raises ValueError for two kinds."""
    found = {kind for kind in kinds if kind is not None}
    if len(found) > 1:
        raise ValueError(" and ".join(f".{EXTENSIONS[kind]}" for kind in sorted(found)))
    return next(iter(found), None)
