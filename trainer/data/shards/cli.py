"""`mixmae shards build | synth | index | check`."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import get_args

import numpy as np
import numpy.typing as npt

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.base.redaction import redact
from mixmae.trainer.data.annotations import AnnotationKind
from mixmae.trainer.data.faults import Reason, describe, first_names, is_usable
from mixmae.trainer.data.index import INVALID_LABEL, UNLABELLED, ShardIndex
from mixmae.trainer.data.shards.build import BuildResult, build_shards, count_reasons
from mixmae.trainer.data.shards.check import check_shards
from mixmae.trainer.data.shards.coco import open_coco
from mixmae.trainer.data.shards.files import REPAIRS, SKIPPED
from mixmae.trainer.data.shards.index_facts import category_ids, class_names, location_of_shards
from mixmae.trainer.data.shards.indexing import write_index
from mixmae.trainer.data.shards.label_map_folders import open_label_maps
from mixmae.trainer.data.shards.parquet import open_parquet, parquet_files
from mixmae.trainer.data.shards.repair import RepairResult, repair
from mixmae.trainer.data.shards.scenes import Scenes
from mixmae.trainer.data.shards.source import Source
from mixmae.trainer.data.shards.sources import open_source
from mixmae.trainer.data.shards.synthetic import Synthetic
from mixmae.trainer.data.shards.unused import Unused
from mixmae.trainer.recipe.arguments import at_least, size
from mixmae.trainer.recipe.sections.section import is_elsewhere


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae shards", description="Make, index and check WebDataset shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build",
        help="tar shards from images, a list of images, or other shards",
        description="Writes tar shards and their index, in parallel. Called again after an interruption, it continues.",
    )
    build.add_argument(
        "source",
        help="a folder of images, or of one folder for each class; a .csv (header 'path,label' or 'path') or .jsonl "
        '({"path": ..., "label": ...}) file; a directory of .tar shards, of which images and labels are taken; a '
        "Parquet file, a folder of them, or a quoted pattern",
    )
    synth = commands.add_parser("synth", help="a procedural, labelled corpus")
    for writing in (build, synth):
        writing.add_argument("out", type=Path, help="shard directory to write")
        writing.add_argument("--shard-size", type=size, default="250MB", help="bytes in a shard (default %(default)s)")
        writing.add_argument("--seed", type=at_least(0), default=0, help="of the order (default %(default)s)")
    build.add_argument(
        "--seekable", action="store_true", help="rewrite JPEGs, losslessly, with restart markers: crops decode faster"
    )
    build.add_argument(
        "--append",
        action="store_true",
        help="add shards to those in OUT: numbers of classes stay, images that are there already are left out",
    )
    build.add_argument("--coco", type=Path, metavar="FILE", help="objects of the images, as COCO's instances_*.json")
    build.add_argument("--label-maps", type=Path, metavar="DIR", help="label maps: PNGs with the names of the images")
    build.add_argument("--class-names", type=Path, metavar="FILE", help="with --label-maps: a class name a line")
    build.add_argument(
        "--reduce-zero-label", action="store_true", help="with --label-maps: label 0 is ignored, 1 is the first class"
    )
    build.add_argument("--label-column", metavar="NAME", help="of Parquet (default: label, or the only ClassLabel)")
    synth.add_argument(
        "--scenes", choices=get_args(AnnotationKind), help="scenes of several objects, with masks or label maps"
    )
    synth.add_argument("--images", type=at_least(1), default=6000)
    synth.add_argument("--img-size", type=at_least(16), default=160)
    index = commands.add_parser("index", help="index shards that another program wrote")
    check = commands.add_parser("check", help="verify everything; exit code 1 if something is damaged")
    check.add_argument("--repair", action="store_true", help="rewrite damaged shards with their intact samples")
    check.add_argument("--json", type=Path, metavar="FILE", help="also write the findings as JSON")
    index.add_argument("--output", type=Path, metavar="DIR", help="write the index there: shards on read-only storage")
    for reading in (index, check):
        reading.add_argument("directory", help="shard directory")
    for command in (build, synth, index, check):
        command.add_argument("--jobs", type=at_least(1), default=os.cpu_count(), help="processes (default: all cores)")
    args = parser.parse_args(argv)
    return {"build": _build, "synth": _synth, "index": _index, "check": _check}[args.command](args)


def _build(args: argparse.Namespace) -> int:
    root = Path(args.source).resolve()
    if args.out.resolve().is_relative_to(root):
        raise UsageError(f"{args.out} lies in {args.source}, where it would be taken for images; write it elsewhere")
    if args.coco is None and args.label_maps is None and (files := parquet_files(args.source)):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=args.out.parent, prefix=f".{args.out.name}.images-") as copy:
            return _build_from(open_parquet(files, Path(copy.name), args.label_column), args)
    if args.label_column is not None:
        raise UsageError(f"--label-column goes with Parquet files, and {args.source} holds none")
    return _build_from(_source(args), args)


def _build_from(source: Source, args: argparse.Namespace) -> int:
    built = build_shards(source, args.out, args.shard_size, args.seed, args.jobs, args.seekable, args.append)
    lines = _describe_build(built, args.seekable)
    print("\n".join([*lines, *_describe_addition(built)] if args.append else lines))
    return 0


def _describe_addition(built: BuildResult) -> list[str]:
    if not built.added:
        return ["nothing added"]
    return [
        f"added {built.added} images",
        "a run that was started on these shards will refuse to continue, since its data changed",
    ]


def _source(args: argparse.Namespace) -> Source:
    """
    Raises:
        UsageError: options that do not go together, or no such source.
    """
    if args.coco is not None and args.label_maps is not None:
        raise UsageError("--coco and --label-maps are both given; images have objects or label maps, not both")
    if args.label_maps is None and (args.reduce_zero_label or args.class_names is not None):
        given = "--reduce-zero-label" if args.reduce_zero_label else "--class-names"
        raise UsageError(f"{given} goes with --label-maps DIR, which is not given")
    if args.coco is not None:
        return open_coco(args.source, args.coco)
    if args.label_maps is not None:
        return open_label_maps(args.source, args.label_maps, args.reduce_zero_label, args.class_names)
    return open_source(args.source, args.jobs)


def _synth(args: argparse.Namespace) -> int:
    source: Source = Synthetic(args.images, args.img_size, args.seed)
    if args.scenes is not None:
        source = Scenes(args.images, args.img_size, args.seed, args.scenes)
    built = build_shards(source, args.out, args.shard_size, args.seed, args.jobs)
    print("\n".join(_describe_build(built, False)))
    return 0


def _describe_build(built: BuildResult, is_seekable: bool) -> list[str]:
    lines, record = [_describe(built.index)], Path(built.index.store.location) / SKIPPED
    if is_seekable:
        total = built.added
        lines.append(f"{total - built.unchanged} of {total} images are JPEGs with restart markers now")
    if built.skipped:
        names = first_names([one.source for one in built.skipped])
        lines.append(f"skipped {count_reasons(built.skipped)}: {names}; all of them in {record}")
    if built.skipped_objects:
        names = first_names([one.source for one in built.skipped_objects])
        count = len(built.skipped_objects)
        lines.append(f"left out {count} objects ({count_reasons(built.skipped_objects)}): {names}; all in {record}")
    if built.left_out:
        lines.append(f"{built.left_out} files of the source are no samples; each with its reason in {record}")
    return lines


def _index(args: argparse.Namespace) -> int:
    directory = _local(args.directory)
    if not directory.is_dir():
        raise UsageError(f"{directory} {what_is(directory)}; expected a directory of shards")
    unused, before = Unused(), args.output or directory
    index = write_index(directory, class_names(before), args.jobs, unused, args.output, category_ids(before))
    where = [] if args.output is None else [f"the index is in {args.output}; name it as data.shards"]
    print("\n".join([_describe(index), *where, *_describe_labels(index), *unused.lines(), *_describe_unusable(index)]))
    return 0


def _describe_labels(index: ShardIndex) -> list[str]:
    """Images without a class where others have one, and labels that are no class."""
    labels = index.samples["label"]
    invalid, unlabelled = np.flatnonzero(labels == INVALID_LABEL), int((labels == UNLABELLED).sum())
    lines = []
    if unlabelled and (labels >= 0).any():
        lines.append(f"unlabelled: {unlabelled} of {len(labels)} images")
    if len(invalid):
        known = f"0 to {len(index.classes) - 1} or the name of a class" if index.classes else "0 or more, or a name"
        lines.append(
            f"unlabelled: {len(invalid)} images with a label that is no class (expected {known}): "
            f"{_names(index, invalid)}"
        )
    return lines


def _names(index: ShardIndex, samples: npt.NDArray[np.int64]) -> str:
    return first_names([index.name_of(int(sample)) for sample in samples[:3]], count=len(samples))


def _describe_unusable(index: ShardIndex) -> list[str]:
    states = index.samples["state"]
    unusable = np.flatnonzero(~is_usable(states))
    if not len(unusable):
        return []
    counts = Counter(Reason(state) for state in states[unusable])
    return [f"{len(unusable)} samples cannot be used ({describe(counts)}): {_names(index, unusable)}"]


def _check(args: argparse.Namespace) -> int:
    directory = _local(args.directory)
    checked = check_shards(directory, args.jobs)
    report = checked.report
    print("\n".join(report.lines()))
    if args.json is not None:
        _write(args.json, json.dumps(report.as_dict(), indent=1) + "\n")
    if report.is_sound or not args.repair:
        print(report.verdict())
        return 0 if report.is_sound else 1
    if (location := location_of_shards(directory)) != directory:
        raise UsageError(f"--repair rewrites shards, and those of {directory} are in {location}; repair them there")
    print("\n".join(_describe_repair(repair(checked, args.jobs), directory)))
    return 0


def _describe_repair(repaired: RepairResult, directory: Path) -> list[str]:
    lines = []
    for one in repaired.rewritten:
        kept = f"rewritten with {one.scanned.shard.samples} samples" if one.scanned else "nothing could be recovered"
        labels = f", {len(one.lost_labels)} without their labels" if one.lost_labels else ""
        lines.append(f"{one.name}: {kept}{labels}, {len(one.lost)} lost; the damaged file is {one.original} now")
    if repaired.lost:
        names = first_names([f"{lost.shard}: {lost.sample} ({lost.reason})" for lost in repaired.lost], 10)
        lines.append(f"lost: {names}; all of them in {directory / REPAIRS}")
    lines.append(f"indexed again: {_describe(repaired.index)}")
    lines.append("sound now; a run that was started on this directory will refuse to continue, since its data changed")
    return lines


def _local(location: str) -> Path:
    if is_elsewhere(location):
        raise UsageError(f"{location} is a URL; index and check shards where they are local, and upload the index")
    return Path(location)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error}") from error


def _describe(index: ShardIndex) -> str:
    size = sum(shard.bytes for shard in index.shards)
    where, images = redact(index.store.location), int(is_usable(index.samples["state"]).sum())
    return f"{where}: {images} images, {len(index.classes)} classes, {len(index.shards)} shards, {size / 1e6:.1f} MB"
