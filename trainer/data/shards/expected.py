"""What a directory's index says of its shards, to hold against what is found in them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mixmae.trainer.data.annotations import ANNOTATED, EXTENSIONS, AnnotationKind
from mixmae.trainer.data.faults import is_usable
from mixmae.trainer.data.index import SAMPLE, Shard, ShardIndex, Table
from mixmae.trainer.data.shards.files import ShardBytes
from mixmae.trainer.data.shards.index_facts import category_ids, class_names


@dataclass(frozen=True)
class Expected:
    """What a directory should hold according to its index, if it has one."""

    directory: Path
    classes: list[str]
    shards: dict[str, tuple[Shard, Table]]
    kinds: Sequence[AnnotationKind] = tuple(EXTENSIONS)
    """Of annotations: that of the index, or any without an index."""
    annotations: dict[str, Table] = field(default_factory=dict)
    """By shard; none where the index has none."""
    category_ids: Sequence[int] = ()
    labels_are_numbers: bool = False
    """Without names; known only once all shards were read."""

    @classmethod
    def of(cls, directory: Path, index: ShardIndex | None) -> "Expected":
        if index is None:
            return cls(directory, class_names(directory), {}, category_ids=category_ids(directory))
        ends = np.cumsum([shard.samples for shard in index.shards])
        tables = np.split(index.samples, ends[:-1])
        rows = {shard.name: (shard, table) for shard, table in zip(index.shards, tables, strict=True)}
        if index.annotations is None or index.annotation_table is None:
            return cls(directory, list(index.classes), rows, ())
        beside = np.split(index.annotation_table, ends[:-1])
        annotations = {shard.name: table for shard, table in zip(index.shards, beside, strict=True)}
        return cls(directory, list(index.classes), rows, (index.annotations,), annotations, index.category_ids)

    def annotations_of(self, shard: str) -> dict[int, Any]:
        """The index's rows of a shard's usable annotations, by the offsets of their images."""
        if shard not in self.annotations:
            return {}
        offsets, rows = self.shards[shard][1]["offset"].tolist(), self.annotations[shard]
        return {offset: row for offset, row in zip(offsets, rows, strict=True) if row["state"] == ANNOTATED}

    def rows(self, shard: str, content: ShardBytes) -> Table:
        """The index rows of a shard's usable samples; none if the file was replaced by another shard.

        It still is the indexed one, however damaged, if at least half of its images that fit into the file are
        unchanged.
        """
        if shard not in self.shards:
            return np.array([], dtype=SAMPLE)
        rows = self.shards[shard][1]
        rows = rows[is_usable(rows["state"])]
        ranges = [(int(row["offset"]), int(row["offset"]) + int(row["size"]), row["hash"]) for row in rows]
        same = [
            xxhash.xxh3_64_intdigest(content[start:end]) == image for start, end, image in ranges if end <= len(content)
        ]
        return rows if 2 * sum(same) >= len(same) else rows[:0]
