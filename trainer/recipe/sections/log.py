"""`log:`: what a run records of its steps."""

from pydantic import Field

from mixmae.trainer.recipe.sections.section import Section
from mixmae.trainer.recipe.units import Duration, Span


class WeightsAndBiases(Section):
    """A run on Weights & Biases. The environment says whether it is online (WANDB_MODE), and who one is."""

    project: str = "mixmae"
    group: str | None = None
    entity: str | None = None


class Log(Section):
    every: int = Field(50, ge=1)
    """Optimizer steps between two logged ones."""
    pictures: Duration | None = Span(5, "epoch")
    """Between two pictures of reconstructions, the first of them after step 1; null for none."""
    samples: bool = False
    """Writes which samples each step used, one file a rank; for audits of what a model has seen."""
    wandb: WeightsAndBiases | None = None
    """Beside the run's own record; needs the extra `wandb`."""
