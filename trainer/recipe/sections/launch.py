"""`launch:`: how ranks are started and watched."""

from typing import Literal

from pydantic import Field

from mixmae.base.liveness import JOIN_SECONDS, STUCK_SECONDS
from mixmae.trainer.recipe.sections.section import Seconds, Section


class Launch(Section):
    """How `mixmae launch` starts ranks, and when it gives a run up."""

    tasks: Literal["per_gpu", "per_node"] = "per_gpu"
    """Under Slurm: one task per rank, or one per node that starts its ranks by DeepSpeed's launcher."""
    port: int | None = Field(None, ge=1024, le=64_000)
    """The first of the few that ranks meet on, on rank 0's host; None: from 20000 to 31000, others for each start."""
    join_seconds: Seconds = JOIN_SECONDS
    """A run whose ranks are not all there by then is ended."""
    stuck_seconds: Seconds = STUCK_SECONDS
    """A run in which no rank moved for so long is ended, naming the late one; thrice that while starting or saving."""
    grace_seconds: Seconds = 120.0
    """From the signal to stop to the end of all ranks: the time to save in; Slurm warns so long before the limit."""
