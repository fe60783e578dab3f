"""A shard that a build has finished, and its record, by which an interrupted build knows it again."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixmae.base.files import atomic_write
from mixmae.base.json_text import parse_json
from mixmae.trainer.data.annotations import ANNOTATION
from mixmae.trainer.data.index import SAMPLE, Shard, Table
from mixmae.trainer.data.shards.annotated import ShardAnnotations
from mixmae.trainer.data.shards.build_plan import BuildPlan


class SkippedImage(NamedTuple):
    """An image that went into no shard."""

    key: str
    source: str
    reason: str
    detail: str = ""


class SkippedObject(NamedTuple):
    """An object that went into no shard, although its image did."""

    key: str
    object: int
    """The id of its annotation."""
    reason: str

    @property
    def source(self) -> str:
        return f"object {self.object} of {self.key}"


class BuiltShard(NamedTuple):
    """A finished shard, as its record describes it."""

    shard: Shard | None
    """None: none of its images could be used, and there is no tar."""
    table: Table
    skipped: list[SkippedImage]
    skipped_objects: list[SkippedObject]
    unchanged: int
    annotations: ShardAnnotations | None


def read_record(plan: BuildPlan, number: int) -> BuiltShard | None:
    """A finished shard; None if it is not finished, or its tar is not as it was."""
    file = plan.record(number)
    if not file.exists():
        return None
    try:
        found = _parsed(file.read_text())
    except (ValueError, TypeError, KeyError, OverflowError):  # damaged since it was written
        return None
    shard = found.shard
    if shard is not None and (not (tar := plan.tar(number)).exists() or tar.stat().st_size != shard.bytes):
        return None
    return found


def _parsed(record: str) -> BuiltShard:
    content = parse_json(record)
    annotations = content["annotations"]
    return BuiltShard(
        Shard(**content["shard"]) if content["shard"] else None,
        _table(content["table"], SAMPLE),
        [SkippedImage(*one) for one in content["skipped"]],
        [SkippedObject(*one) for one in content["skipped_objects"]],
        content["unchanged"],
        None
        if annotations is None
        else ShardAnnotations(
            annotations["kind"], _table(annotations["table"], ANNOTATION), annotations["highest"], []
        ),
    )


def _table(rows: list[list[int]], dtype: np.dtype[Any]) -> Table:
    return np.array([tuple(row) for row in rows], dtype=dtype)


def write_record(file: Path, done: BuiltShard) -> None:
    content = done._asdict() | {"shard": done.shard and done.shard._asdict(), "table": done.table.tolist()}
    if done.annotations is not None:
        content["annotations"] = done.annotations._asdict() | {"table": done.annotations.table.tolist(), "faults": []}
    atomic_write(file, json.dumps(content))
