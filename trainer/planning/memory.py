"""Memory of one GPU, states and activations together, and the largest micro-batch that fits."""

from dataclasses import dataclass

from mixmae.trainer.planning.activation_memory import Footprint
from mixmae.trainer.planning.states import States

MOST_IMAGES = 4096
"""Upper bound of the search for the largest micro-batch."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by kind at the peak of a step; `moment` names the phase."""

    moment: str
    weights: float
    gradients: float
    accumulation: float
    optimizer: float
    activations: float
    buckets: float
    temporary: float

    @property
    def total(self) -> float:
        kept = self.weights + self.gradients + self.accumulation + self.optimizer
        return kept + self.activations + self.buckets + self.temporary


def peak_memory(held: States, footprint: Footprint, micro_batch: int, accumulates: bool) -> Memory:
    """The maximum over a step's three phases: computing, reducing gradients, updating weights.

    Args:
        accumulates: whether gradients of earlier micro-batches are held from the start.
    """
    worst = footprint.worst(micro_batch, with_gradients=held.gradients > 0 and not accumulates)
    gradients = held.gradients if accumulates else worst.gradients
    kept = (held.accumulation, held.optimizer)
    moments = (
        Memory("computing", held.weights, gradients, *kept, worst.activations, held.buckets, worst.temporary),
        Memory("reducing gradients", held.weights, held.gradients, *kept, 0, 0, held.reduction),
        Memory("updating weights", held.weights, 0, *kept, 0, 0, held.update),
    )
    return max(moments, key=lambda memory: memory.total)


def largest_micro_batch(held: States, footprint: Footprint, accumulates: bool, limit: float) -> int:
    """The largest micro-batch that fits into `limit` bytes; 0 if none does."""
    low, high = 0, MOST_IMAGES
    while low < high:
        middle = (low + high + 1) // 2
        if peak_memory(held, footprint, middle, accumulates).total <= limit:
            low = middle
        else:
            high = middle - 1
    return low
