"""`mixmae bench loop`: overhead of the training loop over the bare step.

The loop is that of a run, with collective stop checks, clock, log, exporter and heartbeat. The bare step is forward,
backward and optimizer step of the same engine, on inputs that are on the device. They are interleaved in turns of
`log.every` steps, so that both see the same machine and each turn of the loop logs once; a turn of the loop is compared
with the bare turns before and after it. Batches are in memory: reading data, checkpoints and pictures are excluded.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mixmae.base.errors import UsageError
from mixmae.base.heartbeat import Heartbeat
from mixmae.base.image_size import both_sides
from mixmae.base.ports import free_port
from mixmae.base.signals import StopRequest
from mixmae.trainer.benchmarks.in_memory import InMemory
from mixmae.trainer.benchmarks.profiling import synchronized_time
from mixmae.trainer.benchmarks.recipe import recipe_of
from mixmae.trainer.benchmarks.results import RESULTS, metadata, write_result
from mixmae.trainer.data.batch_reader import Batch
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.synthetic import Synthetic
from mixmae.trainer.engine import distributed
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.context import Run
from mixmae.trainer.run.ending import close
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.run.train_step import inputs_of

_KEPT = 4
"""Number of batches in memory."""
_GOAL = 0.1
"""Seconds of a typical step, of which the loop may add 2 %."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench loop", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, such as log.every=10")
    parser.add_argument("--model", default="mixmae_swin_nano", help="the encoder (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="micro-batch (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="timed, after a warm-up round (default %(default)s)")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "loop.json", help="write the figures")
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1:
        raise UsageError(f"--rounds {args.rounds}: expected 1 or more")
    with tempfile.TemporaryDirectory(prefix="mixmae-bench-") as folder:
        recipe = _recipe(args.model, args.batch, args.overrides, Path(folder), args.rounds)
        with (Path(folder) / "output").open("w") as output, redirect_stdout(output):
            result = measure(recipe, args.rounds)
    low, high = result["added_us_spread"]
    print(
        f"bare step {result['step_ms_bare']:.2f} ms, in the loop {result['step_ms_loop']:.2f} ms: "
        f"{result['ratio'] - 1:+.2%}; the loop adds {result['added_us']:.0f} microseconds ({low:.0f} to {high:.0f}), "
        f"{result['share_of_100_ms']:.2%} of a step of 100 ms"
    )
    if args.json is not None:
        write_result(args.json, result)
    return 0


def _recipe(model: str, batch: int, overrides: Sequence[str], folder: Path, rounds: int) -> Recipe:
    """A recipe that saves no checkpoint and draws no picture before all rounds are over, on a few synthetic images."""
    recipe = recipe_of(model, batch, overrides)
    images = Synthetic(_KEPT * recipe.train.global_batch, max(both_sides(recipe.encoder.img_size)), seed=0)
    build_shards(images, folder / "shards", shard_bytes=10**9, seed=0, jobs=1)
    steps = recipe.log.every * (rounds + 1) + 1  # a run saves after its last step
    own = [
        f"run_dir={folder / 'run'}",
        f"data.shards={folder / 'shards'}",
        "data.num_workers=0",
        f"train.duration={steps} steps",
        "optim.warmup=1 steps",
        f"checkpoint.every={steps} steps",
        "log.pictures=null",
        "monitoring.port=0",
    ]
    return recipe_of(model, batch, [*overrides, *own])


def measure(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Step times in the loop and bare, interleaved in turns of `recipe.log.every` steps.

    Replaces this process's handlers of the signals that stop a run.
    """
    ranks, stop = Ranks(master_port=free_port()), StopRequest()
    job = check(recipe, ranks)
    distributed.join(ranks, recipe.launch.stuck_seconds)
    heartbeat = Heartbeat(recipe.run_dir.with_name("heartbeat"))
    run = prepare(job, ranks, stop, heartbeat)
    clean = False
    try:
        with run.batches as stream:
            batches = [next(stream) for _ in range(_KEPT)]
        turns = run.batches = Turns(run, batches)
        stopped_by = fit(run)
        clean = True
    finally:
        close(run, clean)
        heartbeat.close()
        dist.destroy_process_group()
    if stopped_by is not None:
        raise UsageError(f"{stopped_by} stopped the benchmark after {len(turns.loop)} of {rounds + 1} rounds")
    return _compared(job.recipe, turns, ranks.device)


class Turns(InMemory):
    """A run's input that times a turn of bare steps before it returns the first batch of each turn.

    Attributes:
        bare, loop: seconds per step of each turn; there is one more bare turn.
    """

    def __init__(self, run: Run, batches: Sequence[Batch]) -> None:
        super().__init__(batches)
        self.bare: list[float] = []
        self.loop: list[float] = []
        self._engine, self._device, self._steps = run.engine, run.ranks.device, run.recipe.log.every
        self._inputs = [
            (run.to_device(batch.images), inputs_of(run, batch, number)) for number, batch in enumerate(batches)
        ]
        self._began = 0.0

    def __next__(self) -> Batch:
        if self.given % self._steps == 0:
            self._begin_turn()
        return super().__next__()

    def _begin_turn(self) -> None:
        now = synchronized_time(self._device)
        if self.given:
            self.loop.append((now - self._began) / self._steps)
        started = synchronized_time(self._device)
        for number in range(self._steps):
            images, inputs = self._inputs[number % len(self._inputs)]
            self._engine.backward(self._engine(images, *inputs))
            self._engine.step()
        self._began = synchronized_time(self._device)
        self.bare.append((self._began - started) / self._steps)


def _compared(recipe: Recipe, turns: Turns, device: torch.device) -> dict[str, Any]:
    bare = [(before + after) / 2 for before, after in pairwise(turns.bare)][1:]
    loop = turns.loop[1:]
    added = [with_ - without for with_, without in zip(loop, bare, strict=True)]
    middle, step = statistics.median(added), statistics.median(bare)
    where = metadata()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else where["cpu"],
        "model": recipe.encoder.name,
        "precision": recipe.train.precision,
        "zero_stage": recipe.train.stage,
        "batch": recipe.train.micro_batch,
        "log_every": recipe.log.every,
        "rounds": len(loop),
        "step_ms_bare": round(step * 1000, 4),
        "step_ms_loop": round(statistics.median(loop) * 1000, 4),
        "ratio": round(1 + middle / step, 5),
        "added_us": round(middle * 1e6, 1),
        "added_us_spread": [round(min(added) * 1e6, 1), round(max(added) * 1e6, 1)],
        "share_of_100_ms": round(middle / _GOAL, 6),
    }
