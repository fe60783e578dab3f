"""`checkpoint:`: when a run is saved, and what is kept."""

from typing import Literal

from pydantic import Field

from mixmae.trainer.recipe.sections.section import Section
from mixmae.trainer.recipe.units import Duration, Span


class Checkpoint(Section):
    every: Duration = Span(1, "epoch")
    keep: int = Field(3, ge=1)
    """The last so many are kept."""
    keep_every: Duration | None = None
    """The first one after each such stretch is kept too."""
    keep_best: int = Field(0, ge=0)
    """So many with the best value of `best_metric` are kept too."""
    best_metric: str = "loss"
    """The logged loss, or a figure of the task's evaluation, such as val_loss."""
    best_mode: Literal["min", "max"] = "min"
    asynchronous: bool = True
    """Writes while training goes on, from a copy in host memory: 12 bytes per parameter, shared by the ranks, held from
    the start on. Else training stands until all is written, and no memory is taken."""
    max_failures: int = Field(3, ge=0)
    """Saves in a row that may fail (a full disk) before the run ends."""
    stop_before_end: float = Field(300.0, ge=0, le=1e7)
    """Seconds before the end of a Slurm job's time at which the run saves and stops."""
