"""Training counters saved with each checkpoint: the same on every rank."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass
class TrainState:
    """Counts since the run began. `samples` are counted where they are consumed, after the step that used them."""

    step: int = 0
    samples: int = 0
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient, in all."""
    skipped_in_row: int = 0
    bf16_matmuls: str = ""
    """How a run in bf16 on CPUs multiplies (`engine.cpu`): decided at its first start, and kept when it is resumed."""

    def advance(self, global_batch: int, applied: bool) -> None:
        self.step += 1
        self.samples += global_batch
        self.skipped += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        return cls(**state)
