"""Writing shards: planned beforehand, each an independent job, so that an interrupted build goes on where it was.

The work is done in `OUT.partial`, which becomes OUT when everything is there. Its folder `.build` holds the plan, a
record of each finished shard, and the tars that are being written.
"""

import fcntl
import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
import xxhash
from tqdm import tqdm

from mixmae.base import jsonl
from mixmae.base.errors import UsageError
from mixmae.base.files import atomic_write, publish
from mixmae.trainer.data import jpeg
from mixmae.trainer.data.decode import judge
from mixmae.trainer.data.faults import JPEG, Reason, UnusableError, first_names
from mixmae.trainer.data.index import SAMPLE, Shard, ShardIndex, Table, open_index
from mixmae.trainer.data.shards.indexing import save_index
from mixmae.trainer.data.shards.scan import scan_shard
from mixmae.trainer.data.shards.sources import Entry, Source
from mixmae.trainer.data.shards.workers import run_jobs, tick

LEFT_OUT = "left-out.jsonl"
_NOTES, _PLAN = ".build", "plan.json"
_BLOCK, _RECORD = 512, 10_240
"""Bytes: a tar's members fill whole blocks, the tar whole records."""


class BuildInterruptedError(UsageError):
    exit_code = 130


class LeftOut(NamedTuple):
    """An image that is in no shard."""

    key: str
    source: str
    reason: str


@dataclass(frozen=True)
class Built:
    index: ShardIndex
    left_out: list[LeftOut]
    unchanged: int
    """Images that `seekable` could do nothing for: no JPEGs, or such that jpegtran does not read."""


def count_reasons(left_out: list[LeftOut]) -> str:
    """`3 damaged, 1 empty`."""
    counts = Counter(one.reason for one in left_out).most_common()
    return ", ".join(f"{count} {reason}" for reason, count in counts)


class _Done(NamedTuple):
    """A finished shard."""

    shard: Shard | None
    """None: none of its images could be used, and there is no tar."""
    table: Table
    left_out: list[LeftOut]
    unchanged: int


@dataclass(frozen=True)
class _Work:
    """What all processes of a build need to know."""

    source: Source
    cuts: list[list[int]]
    """For each shard the numbers of its entries, in order."""
    folder: Path
    seekable: bool

    def tar(self, number: int) -> Path:
        return self.folder / f"{number:06d}.tar"

    def record(self, number: int) -> Path:
        return self.folder / _NOTES / f"{number:06d}.json"


def build_shards(source: Source, out: Path, shard_bytes: int, seed: int, jobs: int, seekable: bool = False) -> Built:
    """Writes the source's samples in a seeded random order, so that every shard holds a mixture of classes.

    A second call with the same arguments continues one that was interrupted. The same arguments give the same bytes,
    whatever `jobs` is.

    Args:
        shard_bytes: size of a shard, which one large image may exceed.
        jobs: processes.
        seekable: rewrites JPEGs with restart markers, by which `data.decoder=fast` skips the rows above a crop.

    Raises:
        UsageError: `out` exists, an unfinished build of something else is in its place, a file cannot be read or
            written, or no image can be used.
        BuildInterruptedError: Ctrl-C.
    """
    if seekable:
        jpeg.require_jpegtran()
    if out.exists():
        raise UsageError(f"{out} exists already; name a directory that does not, or remove it")
    partial = out.with_name(out.name + ".partial")
    work = _Work(source, cut(source.entries, shard_bytes, seed), partial, seekable)
    try:
        with _claim(partial, _digest(work), source.describe()):
            done = _run(work, jobs)
            return _finish(work, done, out)
    except KeyboardInterrupt as error:
        there = sum(work.record(number).exists() for number in range(len(work.cuts)))
        raise BuildInterruptedError(
            f"interrupted; {there} of {len(work.cuts)} shards are in {partial}, and the same command continues"
        ) from error
    except OSError as error:
        raise UsageError(
            f"cannot write in {partial} ({error}); once that is mended the same command continues"
        ) from error


def cut(entries: list[Entry], shard_bytes: int, seed: int) -> list[list[int]]:
    """The numbers of the entries, shuffled and dealt to shards of up to `shard_bytes`."""
    cuts: list[list[int]] = []
    room = 0
    for number in random.Random(seed).sample(range(len(entries)), len(entries)):
        need = _tar_bytes(entries[number])
        if need > room:
            cuts.append([])
            room = shard_bytes - _RECORD
        cuts[-1].append(number)
        room -= need
    return cuts


def _tar_bytes(entry: Entry) -> int:
    """What a sample takes in a tar: for image and label a header and whole blocks; long names take two blocks more."""
    name = _BLOCK if len(entry.key) < 95 and entry.key.isascii() else 3 * _BLOCK
    image = name + -(-entry.size // _BLOCK) * _BLOCK
    return image if entry.label < 0 else image + name + _BLOCK


def _digest(work: _Work) -> str:
    """Equal for equal shards."""
    digest = hashlib.sha256(
        json.dumps([work.source.describe(), work.source.classes, work.seekable, work.cuts]).encode()
    )
    for entry in work.source.entries:
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


@contextmanager
def _claim(partial: Path, digest: str, description: str) -> Iterator[None]:
    """Holds the unfinished directory for one build.

    Raises:
        UsageError: another build is at work in it, or left it there unfinished.
    """
    (partial / _NOTES).mkdir(parents=True, exist_ok=True)
    with (partial / _NOTES / _PLAN).open("a+") as plan:
        try:
            fcntl.flock(plan, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another build is at work in {partial}; wait for it, or name another directory"
            ) from error
        plan.seek(0)
        text = plan.read()
        if text or any(partial.glob("*.tar")):
            _refuse_other(partial, text, digest)
        else:
            plan.write(json.dumps({"digest": digest, "source": description}))
            plan.flush()
            os.fsync(plan.fileno())
        yield


def _refuse_other(partial: Path, text: str, digest: str) -> None:
    try:
        plan = json.loads(text)
    except ValueError:
        plan = {}
    if plan.get("digest") != digest:
        raise UsageError(
            f"{partial} holds an unfinished build of {plan.get('source', 'something')} with other images or arguments; "
            f"finish that one by its own command, or remove {partial}"
        )


def _run(work: _Work, jobs: int) -> list[_Done]:
    """Writes the shards that are not there yet; returns all."""
    done = {number: found for number in range(len(work.cuts)) if (found := _read_record(work, number))}
    if done:
        print(f"continuing: {len(done)} of {len(work.cuts)} shards are there", file=sys.stderr)
    open_ones = [number for number in range(len(work.cuts)) if number not in done]
    before = sum(len(work.cuts[number]) for number in done)
    with tqdm(total=len(work.source.entries), initial=before, unit="image", desc=work.folder.stem, disable=None) as bar:
        written = run_jobs(_write_shard, work, open_ones, jobs, bar)
    done.update(zip(open_ones, written, strict=True))
    return [done[number] for number in range(len(work.cuts))]


def _read_record(work: _Work, number: int) -> _Done | None:
    """A finished shard; None if it is not finished, or its tar is not as it was."""
    file = work.record(number)
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    shard = Shard(**content["shard"]) if content["shard"] else None
    if shard is not None and (not (tar := work.tar(number)).exists() or tar.stat().st_size != shard.bytes):
        return None
    table = np.array([tuple(row) for row in content["table"]], dtype=SAMPLE)
    return _Done(shard, table, [LeftOut(*one) for one in content["left_out"]], content["unchanged"])


def _write_record(file: Path, done: _Done) -> None:
    content = done._asdict() | {"shard": done.shard and done.shard._asdict(), "table": done.table.tolist()}
    atomic_write(file, json.dumps(content))


def _write_shard(work: _Work, number: int) -> _Done:
    """One process's part: a tar and its record, each there as a whole or not at all."""
    file, beside = work.tar(number), work.folder / _NOTES / work.tar(number).name
    states: dict[int, int] = {}
    left_out: list[LeftOut] = []
    unchanged = 0
    # No times or owners in the tars: the same images give the same bytes.
    with beside.open("wb") as stream, webdataset.TarWriter(stream, mtime=0, user="", group="") as tar:
        for entry in (work.source.entries[place] for place in work.cuts[number]):
            try:
                extension, content, state, is_changed = _prepare(work, entry)
            except UnusableError as error:
                left_out.append(LeftOut(entry.key, work.source.place(entry), error.reason.label))
            else:
                states[xxhash.xxh3_64_intdigest(content)] = state
                unchanged += not is_changed
                label = {"cls": entry.label} if entry.label >= 0 else {}
                tar.write({"__key__": entry.key, extension: content, **label})
            tick()
    if not states:
        beside.unlink()
        done = _Done(None, np.array([], dtype=SAMPLE), left_out, 0)
    else:
        publish(beside, file)
        # The tar is read back, but its images were decoded above.
        scanned = scan_shard(file, lambda image: states[xxhash.xxh3_64_intdigest(image)], len(work.source.classes))
        done = _Done(*scanned, left_out, unchanged)
    _write_record(work.record(number), done)
    return done


def _prepare(work: _Work, entry: Entry) -> tuple[str, bytes, int, bool]:
    """An image's extension, bytes and state, and whether `seekable` changed it.

    Raises:
        UnusableError: it cannot be used.
        UsageError: it cannot be read.
    """
    try:
        extension, content = work.source.read(entry)
    except OSError as error:
        raise UsageError(
            f"cannot read {work.source.place(entry)} ({error}); once that is mended the same command continues"
        ) from error
    state = judge(content)
    if state >= min(Reason):
        raise UnusableError(Reason(state), "")
    rewritten = _with_restarts(content) if work.seekable and state == JPEG else None
    return (extension, content, state, False) if rewritten is None else (extension, rewritten, JPEG, True)


def _with_restarts(content: bytes) -> bytes | None:
    """The seekable JPEG, or None if jpegtran makes none that decodes as well as it did."""
    try:
        rewritten = jpeg.add_restarts(content)
    except ValueError:
        return None
    return rewritten if judge(rewritten) == JPEG else None


def _finish(work: _Work, done: list[_Done], out: Path) -> Built:
    """Writes the index and gives the directory its name."""
    left_out = [one for part in done for one in part.left_out]
    scanned = [(part.shard, part.table) for part in done if part.shard is not None]
    if not scanned:
        shutil.rmtree(work.folder)
        raise UsageError(
            f"none of the {len(left_out)} images in {work.source.describe()} can be used "
            f"({count_reasons(left_out)}): {first_names([one.source for one in left_out])}"
        )
    save_index(work.folder, scanned, work.source.classes)
    if left_out:
        jsonl.append(work.folder / LEFT_OUT, *(one._asdict() for one in left_out))
    publish(work.folder, out)
    shutil.rmtree(out / _NOTES)
    unchanged = sum(part.unchanged for part in done) if work.seekable else 0
    return Built(open_index(out), left_out, unchanged)
