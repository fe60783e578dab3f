"""`mixmae bench checkpoints RECIPE`: stall of a save, and duration of saving and resuming.

One rank with fp32 weights and AdamW's moments, which is what a checkpoint of the recipe's model holds at any ZeRO
stage. For comparison, DeepSpeed's own blocking save of the same engine.
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

from mixmae.base.errors import UsageError
from mixmae.base.ports import free_port
from mixmae.trainer.benchmarks.results import RESULTS, write_result
from mixmae.trainer.checkpoints.manifest import Progress
from mixmae.trainer.checkpoints.resume import resume
from mixmae.trainer.checkpoints.saver import Saved, Saver
from mixmae.trainer.checkpoints.slices import WEIGHT, ModelSlices
from mixmae.trainer.engine import distributed
from mixmae.trainer.engine.deepspeed_engine import build_engine
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.arguments import add_recipe
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.registry import build_model

_PRODUCT = 1024
_MOMENTS = ("exp_avg", "exp_avg_sq")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench checkpoints", description=__doc__)
    add_recipe(parser)
    parser.add_argument("--folder", type=Path, help="a folder on the storage to measure (default: TMPDIR)")
    parser.add_argument("--saves", type=int, default=3, help="saves of each kind, 3 or more (default %(default)s)")
    parser.add_argument("--json", action="store_true", help=f"write the figures to {RESULTS}")
    args = parser.parse_args(argv)
    if args.saves < 3:
        raise UsageError(f"--saves {args.saves}: expected 3 or more: the first is reported separately")
    recipe = load_recipe(args.recipe, [*args.overrides, "train.zero_stage=0", "train.precision=fp32"])
    with tempfile.TemporaryDirectory(prefix="mixmae-bench-", dir=args.folder) as folder:
        result = measure(recipe.model_copy(update={"run_dir": Path(folder)}), args.saves)
    print(_describe(result))
    if args.json:
        write_result(RESULTS / f"checkpoints-{args.recipe.stem}.json", result)
    return 0


def _describe(result: dict[str, Any]) -> str:
    def timing(name: str) -> str:
        return f"{result[f'{name}_seconds']:.2f} s (first {result[f'first_{name}_seconds']:.2f} s)"

    return (
        f"{result['bytes'] / 1e9:.2f} GB, {result['saves']} saves of each kind: median without the first (first)\n"
        f"allocating host memory  {result['reserve_seconds']:.2f} s in the background\n"
        f"stall of training       {timing('stall')}\n"
        f"asynchronous save       {timing('save')}, compute is {result['slowdown']:.2f} times slower meanwhile\n"
        f"synchronous save        {timing('synchronous')}\n"
        f"save by DeepSpeed       {timing('deepspeed')}, without checksums and fsync\n"
        f"verify and load         {result['resume_seconds']:.2f} s"
    )


def measure(recipe: Recipe, saves: int) -> dict[str, Any]:
    """Seconds of saves of each kind, interleaved."""
    ranks = Ranks(master_port=free_port())
    distributed.join(ranks, recipe.launch.stuck_seconds)
    engine = build_engine(build_model(recipe), recipe, ranks)
    _fill_moments(engine)
    folder = recipe.run_dir / "asynchronous"
    started = time.perf_counter()
    saver = _saver(engine, folder, recipe, ranks, asynchronous=True)
    saver.wait()  # for its staging memory, as during a run's first steps
    reserved = time.perf_counter() - started
    blocking = _saver(engine, recipe.run_dir / "synchronous", recipe, ranks, asynchronous=False)
    seconds: dict[str, list[float]] = {name: [] for name in ("stall", "save", "synchronous", "deepspeed")}
    slowdowns = []
    for turn in range(saves):
        alone = _work_rate(lambda: False)
        saver.save(_progress(turn + 1))
        slowdowns.append(alone / _work_rate(saver.is_writing))
        saved = _outcome(saver)
        seconds["stall"].append(saved.stall)
        seconds["save"].append(saved.seconds)
        blocking.save(_progress(turn + 1))
        synchronous = _outcome(blocking)
        seconds["synchronous"].append(synchronous.seconds)
        _remove(synchronous)
        seconds["deepspeed"].append(_by_deepspeed(engine, recipe.run_dir / "deepspeed"))
    started = time.perf_counter()
    assert resume(engine, folder, ranks) is not None
    resumed = time.perf_counter() - started
    return {
        "encoder": recipe.encoder.name,
        "bytes": saved.bytes,
        "saves": saves,
        "reserve_seconds": round(reserved, 3),
        **{f"first_{name}_seconds": round(times[0], 3) for name, times in seconds.items()},
        **{f"{name}_seconds": round(statistics.median(times[1:]), 3) for name, times in seconds.items()},
        "resume_seconds": round(resumed, 3),
        "slowdown": round(statistics.median(slowdowns), 3),
    }


def _saver(engine: Any, run_dir: Path, recipe: Recipe, ranks: Ranks, asynchronous: bool) -> Saver:
    run_dir.mkdir()
    settings = recipe.checkpoint.model_copy(update={"keep": 1, "asynchronous": asynchronous})
    return Saver(engine, recipe.model_copy(update={"run_dir": run_dir, "checkpoint": settings}), {}, ranks)


def _remove(saved: Saved) -> None:
    """Frees disk space: the checkpoints may be as large as the disk."""
    assert saved.folder is not None
    shutil.rmtree(saved.folder)


def _fill_moments(engine: Any) -> None:
    """Fills AdamW's moments as after a step: pages that were never written would be cheap to copy."""
    slices = ModelSlices(engine)
    slices.begin_load(_MOMENTS, {"step": 1.0})
    for _, kind, values in slices.to_read(_MOMENTS):
        if kind != WEIGHT:
            values.normal_()


def _outcome(saver: Saver) -> Saved:
    saver.wait()
    saved = saver.poll()
    assert saved is not None
    assert saved.folder is not None, saved.error
    return saved


def _work_rate(busy: Callable[[], bool], at_least: float = 1.0) -> float:
    """Matrix products per second, measured for `at_least` seconds and while `busy` is true."""
    x = torch.randn(_PRODUCT, _PRODUCT)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < at_least or busy():
        x @ x
        count += 1
    return count / (time.perf_counter() - started)


def _by_deepspeed(engine: Any, folder: Path) -> float:
    started = time.perf_counter()
    engine.save_checkpoint(str(folder), tag="reference")
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def _progress(step: int) -> Progress:
    return Progress(step, epoch=0.0, loss=None, state={"samples": 0, "skipped": 0}, position={})
