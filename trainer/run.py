"""All that a run's steps need, made once."""

from dataclasses import dataclass, field
from typing import Any

from trainer.agreement import Vote
from trainer.checkpoints.saver import Saver
from trainer.config import Recipe
from trainer.data.index import ShardIndex
from trainer.data.stream import Position, Stream, ToDevice
from trainer.distributed import Ranks
from trainer.observe import Observer
from trainer.optim import Schedule
from trainer.report import NullReporter, Reporter
from trainer.sample_log import SampleLog
from trainer.signals import StopRequest
from trainer.state import TrainState
from trainer.units import Span


@dataclass
class Run:
    """What the steps of a run share.

    Attributes:
        stop: what notes that this rank is asked to stop; None where nothing can.
        loss: mean over all ranks at the last logged step.
    """

    recipe: Recipe
    ranks: Ranks
    engine: Any
    index: ShardIndex
    schedule: Schedule
    state: TrainState
    batches: Stream
    to_device: ToDevice
    reporter: Reporter | NullReporter
    observer: Observer
    saver: Saver
    stop: StopRequest | None = None
    vote: Vote = field(default_factory=Vote)
    loss: float | None = None
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
