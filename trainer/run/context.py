"""The context that all steps of a run share."""

from dataclasses import dataclass, field
from typing import Any

from mixmae.base.signals import StopRequest
from mixmae.trainer.checkpoints.saver import Saver
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.stream import Position, Stream
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.ema import Ema
from mixmae.trainer.engine.schedule import Schedule
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.units import Span
from mixmae.trainer.run.state import TrainState
from mixmae.trainer.run.stop_signal import StopSignalReducer
from mixmae.trainer.tasks.contract import Task
from mixmae.trainer.telemetry.observer import Observer
from mixmae.trainer.telemetry.reporter import NullReporter, Reporter
from mixmae.trainer.telemetry.sample_log import SampleLog


@dataclass
class Run:
    """What the steps of a run share.

    Attributes:
        stop: what notes that this rank is asked to stop; None where nothing can.
        loss: mean over all ranks at the last logged step.
        metrics: the newest figure of each name that evaluations gave.
    """

    recipe: Recipe
    ranks: Ranks
    task: Task
    engine: Any
    index: ShardIndex
    schedule: Schedule
    state: TrainState
    batches: Stream
    to_device: ToDevice
    reporter: Reporter | NullReporter
    observer: Observer
    saver: Saver
    ema: Ema | None = None
    stop: StopRequest | None = None
    stop_signals: StopSignalReducer = field(default_factory=StopSignalReducer)
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    sample_log: SampleLog | None = None

    @property
    def position(self) -> Position:
        return Position(self.recipe.seed, self.state.samples, self.index.fingerprint)

    @property
    def epoch(self) -> float:
        return self.state.samples / len(self.index)


def due(run: Run, every: Span) -> bool:
    """Whether something that happens every so often happens now; at the last step everything does."""
    step, steps = run.state.step, every.steps(len(run.index), run.recipe.train.global_batch)
    return step == run.schedule.total_steps or step % max(1, steps) == 0
