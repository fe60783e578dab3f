"""Writing shards: planned up front, each an independent job, so that an interrupted build resumes where it stopped.

The shards are written to `OUT.partial`, which is renamed to OUT when everything is complete. Its folder `.build` holds
the plan, a record of each finished shard, and the tars that are being written.
"""

import fcntl
import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
import xxhash
from tqdm import tqdm

from mixmae.base import jsonl
from mixmae.base.errors import UsageError
from mixmae.base.files import atomic_write, publish
from mixmae.base.json_text import parse_json
from mixmae.trainer.data import jpeg
from mixmae.trainer.data.annotations import ANNOTATED, ANNOTATION, EXTENSIONS
from mixmae.trainer.data.decode import inspect_image, upright_size
from mixmae.trainer.data.dense.inspection import inspect_annotation
from mixmae.trainer.data.dense.masks import require_mask_api
from mixmae.trainer.data.dense.objects import FaultyObject, without_faulty
from mixmae.trainer.data.faults import JPEG, Reason, UnusableError, first_names
from mixmae.trainer.data.index import SAMPLE, Shard, ShardIndex, Table, open_index
from mixmae.trainer.data.shards.annotated import ShardAnnotations
from mixmae.trainer.data.shards.existing import ALREADY_THERE, Existing
from mixmae.trainer.data.shards.files import SKIPPED
from mixmae.trainer.data.shards.heic import is_heic, to_png
from mixmae.trainer.data.shards.indexing import save_index
from mixmae.trainer.data.shards.scan import ScannedShard, scan_shard
from mixmae.trainer.data.shards.sources import Entry, Source
from mixmae.trainer.data.shards.workers import advance, run_jobs

_NOTES, _PLAN = ".build", "plan.json"
_BLOCK, _RECORD = 512, 10_240
"""Bytes: a tar's members fill whole blocks, the tar whole records."""


class BuildInterruptedError(UsageError):
    exit_code = 130


class SkippedImage(NamedTuple):
    """An image that went into no shard."""

    key: str
    source: str
    reason: str


class SkippedObject(NamedTuple):
    """An object that went into no shard, although its image did."""

    key: str
    object: int
    """The id of its annotation."""
    reason: str

    @property
    def source(self) -> str:
        return f"object {self.object} of {self.key}"


@dataclass(frozen=True)
class BuildResult:
    index: ShardIndex
    skipped: list[SkippedImage]
    skipped_objects: list[SkippedObject]
    left_out: int
    """Files of the source that are no samples; `skipped.jsonl` names them too."""
    unchanged: int
    """Images that `seekable` left as they are: not JPEGs, or unreadable for jpegtran."""
    added: int
    """Images that were written."""


def count_reasons(skipped: Sequence[SkippedImage | SkippedObject]) -> str:
    """`3 damaged, 1 empty`."""
    counts = Counter(one.reason for one in skipped).most_common()
    return ", ".join(f"{count} {reason}" for reason, count in counts)


class _BuiltShard(NamedTuple):
    """A finished shard, as its record describes it."""

    shard: Shard | None
    """None: none of its images could be used, and there is no tar."""
    table: Table
    skipped: list[SkippedImage]
    skipped_objects: list[SkippedObject]
    unchanged: int
    annotations: ShardAnnotations | None


@dataclass(frozen=True)
class _BuildPlan:
    """What every process of a build needs to know."""

    source: Source
    assignment: list[list[int]]
    """For each shard the numbers of its entries, in order."""
    folder: Path
    seekable: bool
    existing: "Existing | None" = None
    """The shards to which these are added."""

    def tar(self, number: int) -> Path:
        first = 0 if self.existing is None else self.existing.next_number
        return self.folder / f"{first + number:06d}.tar"

    def record(self, number: int) -> Path:
        return self.folder / _NOTES / f"{number:06d}.json"


def build_shards(
    source: Source, out: Path, shard_bytes: int, seed: int, jobs: int, seekable: bool = False, append: bool = False
) -> BuildResult:
    """Writes the source's samples in a seeded random order, so that every shard holds a mixture of classes.

    A second call with the same arguments continues one that was interrupted. The same arguments give the same bytes,
    whatever `jobs` is.

    Args:
        shard_bytes: size of a shard, which one large image may exceed.
        jobs: processes.
        seekable: rewrites JPEGs with restart markers, by which `data.decoder=fast` skips the rows above a crop.
        append: adds shards to those of `out`, without images that are there already.

    Raises:
        UsageError: `out` exists, an unfinished build of something else is in its place, a file cannot be read or
            written, or no image can be used.
        BuildInterruptedError: Ctrl-C.
    """
    if seekable:
        jpeg.require_jpegtran()
    if source.annotations == "objects":
        require_mask_api()
    partial, existing, known = out.with_name(out.name + ".partial"), None, list[SkippedImage]()
    if append:
        existing = Existing.of(out, is_unfinished=(partial / _NOTES / _PLAN).exists())
        source, repeated = existing.continued_by(source, jobs)
        known = [SkippedImage(entry.key, source.locate(entry), ALREADY_THERE) for entry in repeated]
        if not source.entries:
            return BuildResult(existing.index, known, [], 0, 0, 0)
    elif out.exists():
        raise UsageError(f"{out} exists already; name a directory that does not, remove it, or --append to its shards")
    plan = _BuildPlan(source, assign_to_shards(source.entries, shard_bytes, seed), partial, seekable, existing)
    try:
        with _lock(partial, _digest(plan), source.describe()):
            done = _run(plan, jobs)
            return _finish(plan, done, out, known)
    except KeyboardInterrupt as error:
        finished = sum(plan.record(number).exists() for number in range(len(plan.assignment)))
        raise BuildInterruptedError(
            f"interrupted; {finished} of {len(plan.assignment)} shards are in {partial}, and the same command continues"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot write in {partial} ({error}); fix that, and the same command continues") from error


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


def _digest(plan: _BuildPlan) -> str:
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
def _lock(partial: Path, digest: str, description: str) -> Iterator[None]:
    """Locks the unfinished directory for one build.

    Raises:
        UsageError: another build is running in it, or left it unfinished.
    """
    (partial / _NOTES).mkdir(parents=True, exist_ok=True)
    with (partial / _NOTES / _PLAN).open("a+") as plan_file:
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


def _run(plan: _BuildPlan, jobs: int) -> list[_BuiltShard]:
    """Writes the missing shards; returns all."""
    done = {number: found for number in range(len(plan.assignment)) if (found := _read_record(plan, number))}
    if done:
        print(f"continuing: {len(done)} of {len(plan.assignment)} shards are written already", file=sys.stderr)
    missing = [number for number in range(len(plan.assignment)) if number not in done]
    before = sum(len(plan.assignment[number]) for number in done)
    with tqdm(total=len(plan.source.entries), initial=before, unit="image", desc=plan.folder.stem, disable=None) as bar:
        written = run_jobs(_write_shard, plan, missing, jobs, bar)
    done.update(zip(missing, written, strict=True))
    return [done[number] for number in range(len(plan.assignment))]


def _read_record(plan: _BuildPlan, number: int) -> _BuiltShard | None:
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


def _parsed(record: str) -> _BuiltShard:
    content = parse_json(record)
    annotations = content["annotations"]
    return _BuiltShard(
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


def _write_record(file: Path, done: _BuiltShard) -> None:
    content = done._asdict() | {"shard": done.shard and done.shard._asdict(), "table": done.table.tolist()}
    if done.annotations is not None:
        content["annotations"] = done.annotations._asdict() | {"table": done.annotations.table.tolist(), "faults": []}
    atomic_write(file, json.dumps(content))


def _write_shard(plan: _BuildPlan, number: int) -> _BuiltShard:
    """Writes one shard: a tar and its record, each complete or not there at all."""
    file, partial = plan.tar(number), plan.folder / _NOTES / plan.tar(number).name
    states: dict[int, int] = {}
    skipped: list[SkippedImage] = []
    skipped_objects: list[SkippedObject] = []
    unchanged = 0
    # No times or owners in the tars: the same images give the same bytes.
    with partial.open("wb") as stream, webdataset.TarWriter(stream, mtime=0, user="", group="") as tar:
        for entry in (plan.source.entries[i] for i in plan.assignment[number]):
            try:
                extension, content, state, is_changed = _prepare(plan, entry)
                annotation, faulty = _prepare_annotation(plan, entry, content)
            except UnusableError as error:
                skipped.append(SkippedImage(entry.key, plan.source.locate(entry), error.reason.label))
            else:
                if plan.existing is not None and plan.existing.holds(content):
                    skipped.append(SkippedImage(entry.key, plan.source.locate(entry), ALREADY_THERE))
                    advance()
                    continue
                states[xxhash.xxh3_64_intdigest(content)] = state
                unchanged += not is_changed
                label = {"cls": entry.label} if entry.label >= 0 else {}
                tar.write({"__key__": entry.key, extension: content, **label, **annotation})
                skipped_objects += [SkippedObject(entry.key, one.id, one.reason.label) for one in faulty]
            advance()
    if not states:
        partial.unlink()
        done = _BuiltShard(None, np.array([], dtype=SAMPLE), skipped, skipped_objects, 0, None)
    else:
        publish(partial, file)
        # The tar is read back, but its images were already decoded above.
        scanned = scan_shard(file, lambda image: states[xxhash.xxh3_64_intdigest(image)], plan.source.classes)
        found = scanned.annotations
        done = _BuiltShard(scanned.shard, scanned.table, skipped, skipped_objects, unchanged, found)
    _write_record(plan.record(number), done)
    return done


def _prepare(plan: _BuildPlan, entry: Entry) -> tuple[str, bytes, int, bool]:
    """An image's extension, bytes and state, and whether `seekable` changed it.

    Raises:
        UnusableError: it cannot be used.
        UsageError: it cannot be read.
    """
    with _reading(plan, entry):
        extension, content = plan.source.read(entry)
    if is_heic(content):
        extension, content = "png", to_png(content)
    state = inspect_image(content)
    if state >= min(Reason):
        raise UnusableError(Reason(state), "")
    rewritten = _with_restarts(content) if plan.seekable and state == JPEG else None
    return (extension, content, state, False) if rewritten is None else (extension, rewritten, JPEG, True)


def _prepare_annotation(
    plan: _BuildPlan, entry: Entry, image: bytes
) -> tuple[dict[str, bytes], Sequence[FaultyObject]]:
    """The file beside an image, by its extension, and the objects that are left out of it.

    Raises:
        UnusableError: the annotation is missing, or cannot be used.
        UsageError: it cannot be read.
    """
    kind = plan.source.annotations
    if kind is None:
        return {}, []
    with _reading(plan, entry):
        content = plan.source.annotation(entry, image)
    found = inspect_annotation(kind, content, *upright_size(image), len(plan.source.classes))
    if found.state != ANNOTATED:
        raise UnusableError(Reason(found.state), found.detail)
    return {EXTENSIONS[kind]: without_faulty(content, found.faulty) if found.faulty else content}, found.faulty


@contextmanager
def _reading(plan: _BuildPlan, entry: Entry) -> Iterator[None]:
    """Turns the OSError of a file that cannot be read into UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot read {plan.source.locate(entry)} ({error}); fix that, and the same command continues"
        ) from error


def _with_restarts(content: bytes) -> bytes | None:
    """The seekable JPEG, or None if jpegtran makes none that decodes as well as it did."""
    try:
        rewritten = jpeg.add_restarts(content)
    except ValueError:
        return None
    return rewritten if inspect_image(rewritten) == JPEG else None


def _finish(plan: _BuildPlan, done: list[_BuiltShard], out: Path, known: list[SkippedImage]) -> BuildResult:
    """Writes the index and renames the directory to `out`."""
    skipped = [*known, *(image for shard in done for image in shard.skipped)]
    skipped_objects = [one for shard in done for one in shard.skipped_objects]
    scanned = [
        ScannedShard(built.shard, built.table, annotations=built.annotations)
        for built in done
        if built.shard is not None
    ]
    unchanged = sum(built.unchanged for built in done) if plan.seekable else 0
    if not scanned and plan.existing is not None:
        shutil.rmtree(plan.folder)
        return BuildResult(plan.existing.index, skipped, skipped_objects, 0, unchanged, 0)
    if not scanned:
        shutil.rmtree(plan.folder)
        raise UsageError(
            f"none of the {len(skipped)} images in {plan.source.describe()} can be used "
            f"({count_reasons(skipped)}): {first_names([one.source for one in skipped])}"
        )
    left_out = [{"source": source, "reason": reason} for source, reason in plan.source.left_out]
    if left_out or skipped or skipped_objects:
        records = (*left_out, *(one._asdict() for one in skipped), *(one._asdict() for one in skipped_objects))
        jsonl.append((plan.folder if plan.existing is None else out) / SKIPPED, *records)
    if plan.existing is None:
        save_index(plan.folder, scanned, plan.source.classes, plan.source.category_ids)
        publish(plan.folder, out)
        shutil.rmtree(out / _NOTES)
    else:
        for one in scanned:  # which nobody reads before the index lists them
            publish(plan.folder / one.shard.name, out / one.shard.name)
        save_index(out, [*plan.existing.scanned(), *scanned], plan.source.classes)
        shutil.rmtree(plan.folder)
    added = sum(one.shard.samples for one in scanned)
    return BuildResult(open_index(out), skipped, skipped_objects, len(left_out), unchanged, added)
