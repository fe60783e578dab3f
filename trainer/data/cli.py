"""`mixmae shards build | synth | index`."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from trainer.data import build, synthetic
from trainer.data.index import ShardIndex, write_index
from trainer.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_size(text: str) -> int:
    """`500MB`, `1G` or plain bytes to bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    if match is None:
        raise UsageError(f"shard size {text!r}: expected a number of bytes such as 500MB or 1GB")
    return int(float(match[1]) * _UNITS[match[2]])


def at_least(low: int) -> Callable[[str], int]:
    """An argument's type: a whole number not below `low`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number, {low} or more")
        return int(text)

    return number


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae shards", description="Make WebDataset shards and their index.")
    commands = parser.add_subparsers(dest="command", required=True)
    build_ = commands.add_parser("build", help="tar shards from a folder of images, or of class folders")
    build_.add_argument("source", type=Path, help="folder of images, or with one folder of images for each class")
    synth = commands.add_parser("synth", help="a procedural, labelled corpus")
    synth.add_argument("--images", type=at_least(1), default=6000)
    synth.add_argument("--img-size", type=at_least(16), default=160)
    index = commands.add_parser("index", help="index shards that others wrote")
    index.add_argument("directory", type=Path)
    for writing in (build_, synth):
        writing.add_argument("out", type=Path, help="shard directory to write")
        writing.add_argument("--shard-size", default="250MB", help="bytes in a shard (default %(default)s)")
        writing.add_argument("--seed", type=at_least(0), default=0)
    for command in (build_, synth, index):
        command.add_argument("--jobs", type=at_least(1), default=os.cpu_count(), help="processes (default: all cores)")
    args = parser.parse_args(argv)
    print(_describe({"build": _build, "synth": _synth, "index": _index}[args.command](args)))
    return 0


def _build(args: argparse.Namespace) -> ShardIndex:
    classes, images = build.find_images(args.source)
    samples = build.read_images(args.source, images, args.seed)
    return build.write_shards(args.out, samples, classes, parse_size(args.shard_size), len(images), args.jobs)


def _synth(args: argparse.Namespace) -> ShardIndex:
    samples = synthetic.samples(args.images, args.img_size, args.seed, args.jobs)
    return build.write_shards(args.out, samples, synthetic.CLASSES, parse_size(args.shard_size), args.images, args.jobs)


def _index(args: argparse.Namespace) -> ShardIndex:
    if not args.directory.is_dir():
        raise UsageError(f"{args.directory} does not exist")
    total = len(list(args.directory.glob("*.tar")))
    with tqdm(total=total, unit="shard", desc="index", disable=None) as bar:
        return write_index(args.directory, jobs=args.jobs, progress=bar.update)


def _describe(index: ShardIndex) -> str:
    size = sum(shard.bytes for shard in index.shards)
    return (
        f"{index.directory}: {len(index)} images, {len(index.classes)} classes, {len(index.shards)} shards, "
        f"{size / 1e6:.1f} MB"
    )
