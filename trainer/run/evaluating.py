"""Evaluations and pictures between train steps; none changes what the steps compute."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from mixmae.models.contract import Trainable
from mixmae.trainer.data.batch_reader import Batch
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.run.context import Run, due
from mixmae.trainer.run.train_step import inputs_of
from mixmae.trainer.telemetry import pictures

_PICTURE_ROWS = 4
Measure = Callable[[Trainable, Ranks, Callable[[], None]], dict[str, float]]


def due_evaluations(run: Run) -> list[Measure]:
    """What the task measures after this step."""
    asked = run.recipe.evaluate
    measures: list[Measure] = []
    if asked.shards is not None and due(run, asked.every):
        measures.append(run.task.evaluate)
    if asked.probe is not None and due(run, asked.probe.every):
        measures.append(run.task.probe)
    return measures


def evaluate(run: Run, measures: Sequence[Measure]) -> None:
    """Evaluates the task on all ranks, with the averaged weights where there are some, and reports its metrics."""
    figures: dict[str, float] = {}

    def beat() -> None:
        run.observer.set_phase("evaluation")

    run.engine.eval()
    with torch.no_grad(), run.ema.applied() if run.ema is not None else nullcontext():
        for measure in measures:
            figures |= measure(run.engine.module, run.ranks, beat)
    run.engine.train()
    run.metrics = {**run.metrics, **figures}
    if run.ranks.is_main:
        run.reporter.evaluation(run.state.step, run.state.samples, figures)
        run.observer.evaluation(figures)


def log_pictures(run: Run, batch: Batch) -> None:
    """Logs pictures of what the model makes of a micro-batch; all ranks compute, the main one draws."""
    images = run.to_device(batch.images)
    run.engine.eval()
    with torch.no_grad():
        columns = run.task.pictures(run.engine.module, images, inputs_of(run, batch, 0), _PICTURE_ROWS)
    run.engine.train()
    if columns and run.ranks.is_main:
        run.reporter.picture(run.state.step, pictures.draw_columns(columns, run.recipe.data))
