"""Writing shards: planned up front, each an independent job, so that an interrupted build resumes where it stopped.

The shards are written to `OUT.partial`, which is renamed to OUT when everything is complete. Its folder `.build` holds
the plan, a record of each finished shard, and the tars that are being written.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mixmae.base import jsonl
from mixmae.base.errors import UsageError
from mixmae.base.files import publish
from mixmae.trainer.data import jpeg
from mixmae.trainer.data.dense.masks import require_mask_api
from mixmae.trainer.data.faults import first_names
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build_plan import NOTES, PLAN, BuildPlan, assign_to_shards, digest_of, lock_build
from mixmae.trainer.data.shards.built_shard import BuiltShard, SkippedImage, SkippedObject, read_record
from mixmae.trainer.data.shards.existing import ALREADY_THERE, Existing
from mixmae.trainer.data.shards.files import SKIPPED
from mixmae.trainer.data.shards.indexing import save_index
from mixmae.trainer.data.shards.scan import ScannedShard
from mixmae.trainer.data.shards.source import Source
from mixmae.trainer.data.shards.workers import run_jobs
from mixmae.trainer.data.shards.write_shard import write_shard


class BuildInterruptedError(UsageError):
    exit_code = 130


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


def _first_detail(skipped: Sequence[SkippedImage]) -> str:
    """What is wrong with the first image of which more is known than the reason."""
    return next((f"; {one.source}: {one.detail}" for one in skipped if one.detail), "")


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
        existing = Existing.of(out, is_unfinished=(partial / NOTES / PLAN).exists())
        source, repeated = existing.continued_by(source, jobs)
        known = [SkippedImage(entry.key, source.locate(entry), ALREADY_THERE) for entry in repeated]
        if not source.entries:
            return BuildResult(existing.index, known, [], 0, 0, 0)
    elif out.exists():
        raise UsageError(f"{out} exists already; name a directory that does not, remove it, or --append to its shards")
    plan = BuildPlan(source, assign_to_shards(source.entries, shard_bytes, seed), partial, seekable, existing)
    try:
        with lock_build(partial, digest_of(plan), source.describe()):
            done = _run(plan, jobs)
            return _finish(plan, done, out, known)
    except KeyboardInterrupt as error:
        finished = sum(plan.record(number).exists() for number in range(len(plan.assignment)))
        raise BuildInterruptedError(
            f"interrupted; {finished} of {len(plan.assignment)} shards are in {partial}, and the same command continues"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot write in {partial} ({error}); fix that, and the same command continues") from error


def _run(plan: BuildPlan, jobs: int) -> list[BuiltShard]:
    """Writes the missing shards; returns all."""
    done = {number: found for number in range(len(plan.assignment)) if (found := read_record(plan, number))}
    if done:
        print(f"continuing: {len(done)} of {len(plan.assignment)} shards are written already", file=sys.stderr)
    missing = [number for number in range(len(plan.assignment)) if number not in done]
    before = sum(len(plan.assignment[number]) for number in done)
    with tqdm(total=len(plan.source.entries), initial=before, unit="image", desc=plan.folder.stem, disable=None) as bar:
        written = run_jobs(write_shard, plan, missing, jobs, bar)
    done.update(zip(missing, written, strict=True))
    return [done[number] for number in range(len(plan.assignment))]


def _finish(plan: BuildPlan, done: list[BuiltShard], out: Path, known: list[SkippedImage]) -> BuildResult:
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
            f"({count_reasons(skipped)}): {first_names([one.source for one in skipped])}{_first_detail(skipped)}"
        )
    if skipped_objects and all(one.annotations is None or one.annotations.highest < 0 for one in scanned):
        shutil.rmtree(plan.folder)
        raise UsageError(
            f"none of the {len(skipped_objects)} objects in {plan.source.describe()} can be used "
            f"({count_reasons(skipped_objects)}): {first_names([one.source for one in skipped_objects])}; each needs a "
            "bbox and a mask (segmentation)"
        )
    left_out = [{"source": source, "reason": reason} for source, reason in plan.source.left_out]
    if left_out or skipped or skipped_objects:
        records = (*left_out, *(one._asdict() for one in skipped), *(one._asdict() for one in skipped_objects))
        jsonl.append((plan.folder if plan.existing is None else out) / SKIPPED, *records)
    if plan.existing is None:
        save_index(plan.folder, scanned, plan.source.classes, plan.source.category_ids)
        publish(plan.folder, out)
        shutil.rmtree(out / NOTES)
    else:
        for one in scanned:  # which nobody reads before the index lists them
            publish(plan.folder / one.shard.name, out / one.shard.name)
        save_index(out, [*plan.existing.scanned(), *scanned], plan.source.classes)
        shutil.rmtree(plan.folder)
    added = sum(one.shard.samples for one in scanned)
    return BuildResult(open_index(out), skipped, skipped_objects, len(left_out), unchanged, added)
