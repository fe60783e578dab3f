"""One shard of a build: each image read, inspected, perhaps rewritten, and put into the tar with what belongs to it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import webdataset
import xxhash

from mixmae.base.errors import UsageError
from mixmae.base.files import publish
from mixmae.trainer.data import jpeg
from mixmae.trainer.data.annotations import ANNOTATED, EXTENSIONS
from mixmae.trainer.data.decode import upright_size
from mixmae.trainer.data.dense.inspection import inspect_annotation
from mixmae.trainer.data.dense.objects import FaultyObject, without_faulty
from mixmae.trainer.data.faults import JPEG, Reason, UnusableError, is_usable
from mixmae.trainer.data.index import SAMPLE
from mixmae.trainer.data.inspection import inspect_image
from mixmae.trainer.data.shards.build_plan import NOTES, BuildPlan
from mixmae.trainer.data.shards.built_shard import BuiltShard, SkippedImage, SkippedObject, write_record
from mixmae.trainer.data.shards.existing import ALREADY_THERE
from mixmae.trainer.data.shards.heic import is_heic, to_png
from mixmae.trainer.data.shards.scan import scan_shard
from mixmae.trainer.data.shards.source import Entry
from mixmae.trainer.data.shards.workers import advance


def write_shard(plan: BuildPlan, number: int) -> BuiltShard:
    """Writes one shard: a tar and its record, each complete or not there at all."""
    file, partial = plan.tar(number), plan.folder / NOTES / plan.tar(number).name
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
                skipped.append(SkippedImage(entry.key, plan.source.locate(entry), error.reason.label, str(error)))
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
        done = BuiltShard(None, np.array([], dtype=SAMPLE), skipped, skipped_objects, 0, None)
    else:
        publish(partial, file)
        # The tar is read back, but its images were already decoded above.
        scanned = scan_shard(file, lambda image: states[xxhash.xxh3_64_intdigest(image)], plan.source.classes)
        found = scanned.annotations
        done = BuiltShard(scanned.shard, scanned.table, skipped, skipped_objects, unchanged, found)
    write_record(plan.record(number), done)
    return done


def _prepare(plan: BuildPlan, entry: Entry) -> tuple[str, bytes, int, bool]:
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
    if not is_usable(state):
        raise UnusableError(Reason(state), "")
    rewritten = _with_restarts(content) if plan.seekable and state == JPEG else None
    return (extension, content, state, False) if rewritten is None else (extension, rewritten, JPEG, True)


def _prepare_annotation(plan: BuildPlan, entry: Entry, image: bytes) -> tuple[dict[str, bytes], Sequence[FaultyObject]]:
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
def _reading(plan: BuildPlan, entry: Entry) -> Iterator[None]:
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
