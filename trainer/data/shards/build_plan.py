"""What a build is going to write: which images go into which shard, and the directory in which it is written."""

import fcntl
import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.base.json_text import parse_json
from mixmae.trainer.data.shards.existing import Existing
from mixmae.trainer.data.shards.source import Entry, Source

NOTES, PLAN = ".build", "plan.json"
_BLOCK, _RECORD = 512, 10_240
"""Bytes: a tar's members fill whole blocks, the tar whole records."""


@dataclass(frozen=True)
class BuildPlan:
    """What every process of a build needs to know."""

    source: Source
    assignment: list[list[int]]
    """For each shard the numbers of its entries, in order."""
    folder: Path
    seekable: bool
    existing: Existing | None = None
    """The shards to which these are added."""

    def tar(self, number: int) -> Path:
        first = 0 if self.existing is None else self.existing.next_number
        return self.folder / f"{first + number:06d}.tar"

    def record(self, number: int) -> Path:
        return self.folder / NOTES / f"{number:06d}.json"


def assign_to_shards(entries: list[Entry], shard_bytes: int, seed: int) -> list[list[int]]:
    """The numbers of the entries, shuffled and assigned to shards of up to `shard_bytes`."""
    shards: list[list[int]] = []
    room = 0
    for number in random.Random(seed).sample(range(len(entries)), len(entries)):
        need = _tar_bytes(entries[number])
        if need > room:
            shards.append([])
            room = shard_bytes - _RECORD
        shards[-1].append(number)
        room -= need
    return shards


def _tar_bytes(entry: Entry) -> int:
    """Bytes that a sample takes in a tar: a header and whole blocks for each file; long names take two more."""
    name = _BLOCK if len(entry.key) < 95 and entry.key.isascii() else 3 * _BLOCK
    image = name + -(-entry.size // _BLOCK) * _BLOCK
    annotation = name + -(-entry.annotation_size // _BLOCK) * _BLOCK if entry.annotation_size else 0
    return image + annotation if entry.label < 0 else image + annotation + name + _BLOCK


def digest_of(plan: BuildPlan) -> str:
    """Equal for equal shards."""
    digest = hashlib.sha256(
        json.dumps([plan.source.describe(), plan.source.classes, plan.seekable, plan.assignment]).encode()
    )
    if plan.existing is not None:
        digest.update(plan.existing.index.fingerprint.encode())
    for entry in plan.source.entries:
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


@contextmanager
def lock_build(partial: Path, digest: str, description: str) -> Iterator[None]:
    """Locks the unfinished directory for one build.

    Raises:
        UsageError: another build is running in it, or left it unfinished.
    """
    (partial / NOTES).mkdir(parents=True, exist_ok=True)
    with (partial / NOTES / PLAN).open("a+") as plan_file:
        try:
            fcntl.flock(plan_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another build is running in {partial}; wait for it, or name another directory"
            ) from error
        plan_file.seek(0)
        text = plan_file.read()
        if text or any(partial.glob("*.tar")):
            _refuse_other(partial, text, digest)
        else:
            plan_file.write(json.dumps({"digest": digest, "source": description}))
            plan_file.flush()
            os.fsync(plan_file.fileno())
        yield


def _refuse_other(partial: Path, text: str, digest: str) -> None:
    try:
        plan = dict(parse_json(text))
    except (ValueError, TypeError):
        plan = {}
    if plan.get("digest") != digest:
        raise UsageError(
            f"{partial} holds an unfinished build of {plan.get('source', 'something')} with other images or arguments; "
            f"finish that one by its own command, or remove {partial}"
        )
