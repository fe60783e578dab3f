"""`optim:`: learning rate and its schedule, weight decay, moving average."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mixmae.trainer.recipe.sections.section import Section, Share
from mixmae.trainer.recipe.units import Duration, Span


class Optim(Section):
    base_lr: float = Field(1.5e-4, gt=0)
    """Learning rate at a global batch of 256; the run's is base_lr * global_batch / 256."""
    min_lr: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "poly", "step"] = "cosine"
    """How the learning rate falls to min_lr after its warm-up."""
    poly_power: float = Field(1.0, gt=0)
    """Of poly; 1 is a straight line."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Of step: shares of train.duration after which the learning rate is multiplied by gamma, ascending."""
    gamma: float = Field(0.1, gt=0, lt=1)
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    no_decay: tuple[str, ...] | None = None
    """Parts of names exempt from weight decay, beside all 1-D parameters; None exempts what the model names (bias
    tables, mask tokens), () decays that too, as the release does."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay in each step of a moving average of the fp32 weights, which is then evaluated and exported; None: none."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer's learning rate over that of the layer above it, where an encoder is fine-tuned."""
    layer_decay_rule: Literal["standard", "mixmim", "simmim"] = "standard"
    """Which layer is which: `standard` gives final norm and head the full rate, as BEiT; `mixmim` (the release) that of
    a layer below; `simmim` as standard, with patch merging of the layer before it, not behind."""
    warmup: Duration = Span(40, "epoch")
    clip_grad: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _steps_have_milestones(self) -> Self:
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"schedule={self.schedule} with milestones={list(self.milestones)}: set both for steps, such as "
                "schedule=step milestones=[0.889,0.963], or leave milestones out"
            )
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            raise ValueError(f"milestones={list(self.milestones)}: expected ascending shares of train.duration")
        return self
