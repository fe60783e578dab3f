"""`mixmae bench scale`: 1, 2, 4, ... ranks on this machine, and the traffic of each ZeRO stage.

Ranks of one machine share its cores and memory, so images per second show overhead between ranks, not how a cluster
would scale. Bytes are counted by DeepSpeed's logger in one optimizer step, and compared with the formula of
`mixmae plan`.
"""

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from mixmae.base.errors import UsageError
from mixmae.trainer.benchmarks.ranks import run_ranks
from mixmae.trainer.benchmarks.recipe import recipe_of
from mixmae.trainer.benchmarks.results import RESULTS, metadata, write_measurements
from mixmae.trainer.engine.deepspeed_engine import build_engine, deepspeed_config
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.planning.activation_memory import on_meta
from mixmae.trainer.planning.states import Limits, count_parameters
from mixmae.trainer.planning.traffic import traffic
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.registry import task_of
from mixmae.trainer.telemetry.comms import Communication

OPERATIONS = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather_into_tensor",
    "reduce-scatter": "reduce_scatter_tensor",
}
"""Operations in `mixmae plan` and in DeepSpeed's logger."""
_WARM_UP = 3
"""ZeRO-3 records two steps before it prefetches."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench scale", description=__doc__)
    parser.add_argument("--model", default="mixmae_swin_nano", help="the encoder (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="micro-batch (default %(default)s)")
    parser.add_argument("--ranks", default="1,2,4", help="world sizes (default %(default)s)")
    parser.add_argument("--stages", default="1,2,3", help="ZeRO stages (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default %(default)s)")
    parser.add_argument("--json", action="store_true", help=f"write the measurements to {RESULTS}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, as encoder.img_size=128")
    args = parser.parse_intermixed_args(argv)
    worlds, stages = (_numbers(name, getattr(args, name)) for name in ("ranks", "stages"))
    found = []
    for world_size in worlds:
        for stage in stages:
            own = [f"train.zero_stage={stage}", "monitoring.comms_logger=false"]
            recipe = recipe_of(args.model, args.batch, [*own, *args.overrides], world_size)
            found.append({**measure(recipe, world_size, args.steps), **metadata()})
            print(_describe(found[-1]))
    if args.json:
        write_measurements(RESULTS / f"scale-{args.model}.json", found)
    return 0


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{name} {text}: expected comma-separated integers, such as 1,2,4") from error


def measure(recipe: Recipe, world_size: int, steps: int) -> dict[str, Any]:
    """Images per second, then bytes of a step by DeepSpeed's logger."""
    threads = max(1, (os.cpu_count() or 1) // world_size)
    seconds, sent = run_ranks(_seconds_and_bytes, world_size, recipe, steps, threads=threads)[0]
    limits = Limits.of(deepspeed_config(recipe, world_size))
    plan = planned(recipe, world_size, limits) if world_size > 1 else {}
    return {
        "model": recipe.encoder.name,
        "ranks": world_size,
        "zero_stage": recipe.train.stage,
        "precision": recipe.train.precision,
        "batch": recipe.train.micro_batch,
        "images_per_second": round(recipe.train.global_batch * steps / seconds, 2),
        "bytes": {name: sent[name] for name in plan},
        "planned_bytes": plan,
    }


def planned(recipe: Recipe, world_size: int, limits: Limits) -> dict[str, float]:
    """Planned bytes of a step by operation, of the unsharded tensors."""
    train = recipe.train
    parameters = count_parameters(on_meta(recipe), limits)
    parts = traffic(train.stage, train.precision, parameters, recipe.accumulation(world_size), limits)
    return {part.operation: part.bytes for part in parts}


def _seconds_and_bytes(ranks: Ranks, recipe: Recipe, steps: int) -> tuple[float, dict[str, float]]:
    step, end = _step_of(recipe, ranks)
    for _ in range(_WARM_UP):
        step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = time.perf_counter() - started
    end()
    return seconds, bytes_of_a_step(recipe, ranks)


def bytes_of_a_step(recipe: Recipe, ranks: Ranks) -> dict[str, float]:
    """Bytes of a step by operation, of unsharded tensors; DeepSpeed's logger counts shards of all-gathers."""
    logged = recipe.model_copy(update={"monitoring": recipe.monitoring.model_copy(update={"comms_logger": True})})
    step, end = _step_of(logged, ranks)
    sent = Communication()
    for _ in range(_WARM_UP):
        step()
    sent.read()
    before = dict(sent.bytes)
    step()
    sent.read()
    end()
    factor = {"all-gather": ranks.world_size}
    return {
        name: float((sent.bytes[key] - before.get(key, 0)) * factor.get(name, 1)) for name, key in OPERATIONS.items()
    }


def _step_of(recipe: Recipe, ranks: Ranks) -> tuple[Any, Any]:
    """A function that does an optimizer step on random pixels, and one that destroys the engine."""
    task = task_of(recipe)
    engine = build_engine(task.build(), recipe, ranks)
    batch = recipe.train.micro_batch
    images = torch.randn(batch, *recipe.image_shape, device=ranks.device)

    def step() -> None:
        for _ in range(recipe.accumulation(ranks.world_size)):
            inputs = [part.to(ranks.device) for part in task.example_inputs(engine.module, batch)]
            engine.backward(engine(images, *inputs))
            engine.step()

    return step, engine.destroy


def _describe(found: dict[str, Any]) -> str:
    traffics = "; ".join(
        f"{name} {found['bytes'][name] / 1e6:.2f} MB, planned {plan / 1e6:.2f}"
        for name, plan in found["planned_bytes"].items()
    )
    head = f"{found['ranks']} ranks, ZeRO-{found['zero_stage']}: {found['images_per_second']:.1f} images/s"
    return f"{head}; a step's traffic: {traffics or 'none'}"
