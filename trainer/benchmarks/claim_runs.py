"""Single runs of `mixmae bench claim`, each in a process of its own with one thread and one rank."""

import multiprocessing
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from mixmae.base.errors import UsageError
from mixmae.trainer.benchmarks.ranks import run_ranks
from mixmae.trainer.engine.auto import fit_here
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.ending import close
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.run.train_step import train_step
from mixmae.trainer.tasks.registry import task_of

_WARM_UP = 3


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(ranks, *args)` returns, in a process that has torch and DeepSpeed from the start."""
    multiprocessing.set_forkserver_preload(["deepspeed", "mixmae.trainer.run.lifecycle", __name__])
    return run_ranks(function, 1, *args, threads=1, start_method="forkserver")[0]


def step_seconds(ranks: Ranks, recipe: Recipe, steps: int) -> float:
    """Median processor time of a train step, reading and augmenting its images included."""
    run = prepare(check(recipe, ranks), ranks)
    times = []
    for _ in range(_WARM_UP + steps):
        started = time.process_time()
        train_step(run)
        times.append(time.process_time() - started)
    close(run, clean=True)
    return median(times[_WARM_UP:])


def trained(ranks: Ranks, recipe: Recipe) -> dict[str, float]:
    """Processor time of a whole run, from its first step to its last, and what it measured at its end.

    Raises:
        UsageError: it has run before.
    """
    run = prepare(check(recipe, ranks), ranks)
    if run.state.step:
        close(run, clean=True)
        raise UsageError(f"{recipe.run_dir} holds a run of which no result was written; remove it")
    started = time.process_time()
    fit(run)
    seconds = time.process_time() - started
    metrics = run.metrics
    close(run, clean=True)
    return {"processor_seconds": round(seconds, 1), **metrics}


def probed(ranks: Ranks, recipe: Recipe) -> dict[str, float]:
    """The probe of a pretraining recipe's encoder before its first step: of `encoder.init`, or of random weights."""
    task = task_of(fit_here(recipe, ranks))
    module = task.build().eval()
    task.initialise(module)
    return task.probe(module, ranks, lambda: None)
