"""`optim:`: learning rate and its schedule, weight decay, moving average."""

from typing import Literal

from pydantic import Field

from mixmae.trainer.recipe.sections.section import Section, Share
from mixmae.trainer.recipe.units import Duration, Span


class Optim(Section):
    base_lr: float = Field(1.5e-4, gt=0)
    """Learning rate at a global batch of 256; the run's is base_lr * global_batch / 256."""
    min_lr: float = Field(0.0, ge=0)
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
