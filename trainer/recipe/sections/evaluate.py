"""`evaluate:`: what is measured while a run goes on."""

from pydantic import Field

from mixmae.trainer.recipe.sections.section import Section, Shards
from mixmae.trainer.recipe.units import Duration, Span


class Probe(Section):
    """How well frozen features of unmixed images tell classes apart, measured while the encoder is pretrained."""

    shards: Shards
    """A directory or URL. With labels: accuracy of k nearest neighbours and of a linear classifier, on a half of the
    images after learning from the other. Without any: effective rank and mean cosine, which show collapse, alone."""
    every: Duration = Span(10, "epoch")


class Evaluate(Section):
    """What is measured while the run goes on; its figures become curves, gauges and criteria for `keep_best`."""

    every: Duration = Span(5, "epoch")
    shards: Shards | None = None
    """Held-out shards for the task's evaluation, a directory or URL; None evaluates nothing. The ranks themselves read
    the images, between two steps: some thousands of them will do."""
    probe: Probe | None = None
    """What is probed while an encoder is pretrained; some thousands of images will do here too."""
    crop_ratio: float | None = Field(None, gt=0, le=1)
    """Side of the centre crop over the image's shorter side; None: 0.875 (256 to 224 px) up to 224 px, 1 above."""
