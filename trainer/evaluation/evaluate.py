"""`mixmae evaluate MODEL SHARDS`: a classifier on labelled images, every one counted exactly once, on any ranks; or
an exported detector or segmenter on annotated ones.

Images are resized to 256 px and cropped to 224 up to 224 px, and not cropped above, unless the model's configuration
says another `crop_pct`. On several ranks: `--local N`, or started by srun or torchrun.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import UsageError, run_cli
from mixmae.base.heartbeat import Heartbeat, begin_heartbeat
from mixmae.base.redaction import redact
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.integrity import require_labels
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.engine.distributed import Ranks, join, leave, read_ranks
from mixmae.trainer.evaluation.frozen_model import FrozenModel, open_model
from mixmae.trainer.evaluation.held_out import require_readable
from mixmae.trainer.evaluation.score import Score, draw_confusion, require_plots
from mixmae.trainer.evaluation.score_model import Settings, figures, report, score_model
from mixmae.trainer.evaluation.truth import truth
from mixmae.trainer.evaluation.whole_model import measure, open_for, result_file, table
from mixmae.trainer.export.task_config import task_recipe

_BATCH, _WHOLE_BATCH = 64, 4


def check(args: argparse.Namespace, model: FrozenModel, index: ShardIndex, bank_index: ShardIndex | None) -> None:
    """Raises UsageError for whatever would be found out only after hours."""
    if model.multi_label:
        for given, option in ((args.knn, "--knn"), (args.confusion, "--confusion")):
            if given is not None:
                raise UsageError(f"{option} is for one class an image, and {model.name} gives any number; leave it out")
    if not model.num_classes and bank_index is None:
        raise UsageError(f"{model.name} has no classifier; fine-tune it, or name labelled images for kNN: --knn SHARDS")
    if args.results is not None:
        raise UsageError(f"--results {args.results} is for detectors, and {model.name} is none; leave it out")
    if args.confusion is not None:
        require_plots("--confusion")
        if not model.num_classes:
            raise UsageError(f"--confusion: {model.name} has no classifier; leave it out")
    require_readable(index, "mixmae evaluate")
    if model.num_classes:
        truth(index, model)
    if bank_index is not None:
        require_readable(bank_index, "--knn")
        require_labels(bank_index, "--knn")
        require_labels(index, "--knn")
        if index.classes != bank_index.classes:
            raise UsageError(f"{args.shards} and {args.knn} have other class names; build both with the same --classes")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mixmae evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="directory of 'mixmae export' or 'import', or a name that timm knows")
    parser.add_argument("shards", help="labelled shards, a directory or URL")
    parser.add_argument("--knn", metavar="SHARDS", help="also: k nearest neighbours among the features of these images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, those of each class too")
    parser.add_argument("--confusion", type=Path, metavar="FILE", help="draw the confusion matrix (.png, .svg, .pdf)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write what a detector finds as COCO results")
    parser.add_argument(
        "--batch", type=int, help="images at once on each rank (default 64; of detectors, segmenters 4)"
    )
    parser.add_argument("--threads", type=int, help="that decode on each rank; default: its share of the cores")
    parser.add_argument("--local", type=int, metavar="N", help="N ranks on this machine, one per accelerator")
    parser.add_argument("--world-size", type=int, metavar="N", help="refuse to run with another number of ranks")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.batch is not None and args.batch < 1:
        raise UsageError(f"--batch {args.batch}: expected 1 or more")
    for option in ("json", "confusion", "results"):
        given = getattr(args, option)
        if given is not None and not given.parent.is_dir():
            raise UsageError(f"--{option} {given}: {given.parent} is no directory")
    return args


def evaluate_whole(args: argparse.Namespace, threads: int, heartbeat: Heartbeat, ranks: Ranks) -> None:
    """Measures a detector or segmenter, and reports it."""
    for given, option in ((args.knn, "--knn"), (args.confusion, "--confusion")):
        if given is not None:
            raise UsageError(f"{option} is for classifiers, and {args.model} is none; leave it out")
    task, module = open_for(Path(args.model), args.shards, args.batch or _WHOLE_BATCH, threads, ranks)
    results = None if args.results is None else result_file(task, args.results)
    if ranks.world_size > 1:
        join(ranks)
    found = measure(task, module, ranks, lambda: heartbeat.set_phase("evaluation"), results)
    if ranks.is_main:
        print("\n".join([f"{task.describe()}, on {redact(args.shards)}", *table(found)]))
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1) + "\n")


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    ranks = read_ranks(os.environ)
    if args.world_size not in (None, ranks.world_size):
        raise UsageError(f"expected world size {args.world_size}, got {ranks.world_size}; refusing to start")
    heartbeat = begin_heartbeat(os.environ)
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = args.threads or max(1, cores)
    if task_recipe(Path(args.model)) is not None:
        evaluate_whole(args, threads, heartbeat, ranks)
        return _leave(heartbeat, ranks)
    model = open_model(args.model, ranks.device)
    index = open_index(args.shards)
    bank_index = None if args.knn is None else open_index(args.knn)
    check(args, model, index, bank_index)
    if ranks.world_size > 1:
        join(ranks)
    settings = Settings(args.batch or _BATCH, threads, heartbeat)
    score, neighbours = score_model(model, index, bank_index, settings, ranks)
    if ranks.is_main:
        found = figures(model, index, score, neighbours)
        report(found, ranks)
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
        if args.confusion is not None and isinstance(score, Score):
            draw_confusion(score, model.describe, args.confusion)
    return _leave(heartbeat, ranks)


def _leave(heartbeat: Heartbeat, ranks: Ranks) -> int:
    heartbeat.close()
    if ranks.world_size > 1:
        leave(0)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
