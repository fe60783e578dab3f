"""`mixmae bench checkpoints RECIPE`: how long training stands still for a save, and how long a save and a resume take.

One rank with fp32 weights and AdamW's moments: what a checkpoint of the recipe's model holds at any ZeRO stage. Beside
it DeepSpeed's own save of the same engine, which training waits for.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer import distributed
from trainer.benchmarks.results import RESULTS, write_result
from trainer.checkpoints.layout import Manifest
from trainer.checkpoints.pieces import MOMENTS, Pieces
from trainer.checkpoints.resume import resume
from trainer.checkpoints.saver import Saved, Saver
from trainer.config import Recipe
from trainer.distributed import Ranks
from trainer.engine import build_engine, build_model
from trainer.ports import free_port
from trainer.recipes import load_recipe

_PRODUCT = 1024


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench checkpoints", description=__doc__)
    parser.add_argument("recipe", type=Path, help="YAML file, such as configs/pretrain/swin_huge.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--folder", type=Path, help="on the storage to measure (default: the temporary folder)")
    parser.add_argument("--saves", type=int, default=3, help="of each kind; medians are shown (default %(default)s)")
    parser.add_argument("--json", action="store_true", help=f"write the figures to {RESULTS}")
    args = parser.parse_args(argv)
    recipe = load_recipe(args.recipe, [*args.overrides, "train.zero_stage=0", "train.precision=fp32"])
    with tempfile.TemporaryDirectory(prefix="mixmae-bench-", dir=args.folder) as folder:
        result = measure(recipe.model_copy(update={"run_dir": Path(folder)}), args.saves)
    print(
        f"{result['bytes'] / 1e9:.2f} GB: training stands for {result['stall_seconds']:.2f} s of the "
        f"{result['save_seconds']:.2f} s that a save takes; written while it waits: "
        f"{result['synchronous_seconds']:.2f} s; by DeepSpeed: {result['deepspeed_seconds']:.2f} s\n"
        f"work beside the writing takes {result['slowdown']:.2f} of its time without; verified and loaded again in "
        f"{result['resume_seconds']:.2f} s"
    )
    if args.json:
        write_result(RESULTS / f"checkpoints-{args.recipe.stem}.json", result)
    return 0


def measure(recipe: Recipe, saves: int) -> dict[str, Any]:
    """Seconds of saves of each kind, taking turns."""
    ranks = Ranks(master_port=free_port())
    distributed.join(ranks)
    engine = build_engine(build_model(recipe), recipe, ranks)
    _fill_moments(engine)
    saver = Saver(engine, recipe.run_dir, recipe.checkpoint.model_copy(update={"keep": 1}), ranks)
    _work_rate(lambda: not saver.is_ready())  # as a run, whose first save comes much later
    beside, told = [], []
    waited, reference = [], []
    for turn in range(saves):
        alone = _work_rate(lambda: False)
        saver.save(_manifest(recipe, 2 * turn + 1))
        beside.append(alone / _work_rate(saver.is_writing))
        told.append(_outcome(saver))
        started = time.perf_counter()
        saver.save(_manifest(recipe, 2 * turn + 2))
        told_waiting = _outcome(saver)
        assert told_waiting.folder is not None, told_waiting.error
        waited.append(time.perf_counter() - started)
        reference.append(_by_deepspeed(engine, recipe.run_dir / "deepspeed"))
    started = time.perf_counter()
    assert resume(engine, recipe.run_dir, ranks) is not None
    return {
        "encoder": recipe.model.encoder,
        "bytes": told[-1].bytes,
        "stall_seconds": round(statistics.median(saved.stall for saved in told), 3),
        "first_stall_seconds": round(told[0].stall, 3),
        "save_seconds": round(statistics.median(saved.seconds for saved in told), 3),
        "synchronous_seconds": round(statistics.median(waited), 3),
        "deepspeed_seconds": round(statistics.median(reference), 3),
        "resume_seconds": round(time.perf_counter() - started, 3),
        "slowdown": round(statistics.median(beside), 3),
        "saves": saves,
    }


def _fill_moments(engine: Any) -> None:
    """As after a step, without taking one: memory that was never written to would be copied for nothing."""
    pieces = Pieces(engine)
    pieces.begin(1)
    for piece in pieces.held:
        for kind in MOMENTS:
            pieces.values(piece, kind).normal_()


def _outcome(saver: Saver) -> Saved:
    saver.wait()
    saved = saver.poll()
    assert saved is not None
    return saved


def _work_rate(go_on: Callable[[], bool], at_least: float = 1.0) -> float:
    """Matrix products a second, for a second or as long as `go_on` says."""
    x = torch.randn(_PRODUCT, _PRODUCT)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < at_least or go_on():
        x @ x
        count += 1
    return count / (time.perf_counter() - started)


def _by_deepspeed(engine: Any, folder: Path) -> float:
    started = time.perf_counter()
    engine.save_checkpoint(str(folder), tag="reference")
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def _manifest(recipe: Recipe, step: int) -> Manifest:
    return Manifest(
        step=step,
        optimizer_step=1,
        epoch=0.0,
        loss=None,
        state={"samples": 0, "skipped": 0},
        position={},
        world_size=1,
        zero_stage=0,
        recipe=recipe.model_dump(mode="json"),
        versions={},
        shapes={},
        files={},
    )
