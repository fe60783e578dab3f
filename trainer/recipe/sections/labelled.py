"""`classification:`, `linear:` and `augment:`: images with labels."""

from typing import Annotated

from pydantic import Field

from mixmae.trainer.recipe.sections.section import Fraction, Section


class Classification(Section):
    """Classes, where images have labels."""

    num_classes: int | None = Field(None, gt=1)
    """None: as many as `data.shards` has."""
    classes: tuple[str, ...] | None = None
    """Their names, in the order of their numbers; None: those of `data.shards`, () where they have numbers alone."""
    multi_label: bool = False
    """Whether an image has any number of classes: its label is a list of names, separated by commas."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class Linear(Section):
    """Linear probes of one frozen encoder, all trained in one pass: a classifier for each pair of the two lists."""

    lr_scales: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.1, 0.3, 1.0, 3.0, 10.0), min_length=1)
    """Learning rates over the schedule's."""
    stages: tuple[Annotated[int, Field(gt=0)], ...] = Field((1, 2), min_length=1)
    """So many of the encoder's last stages are pooled, and their features put side by side."""
    cache_features: bool = False
    """Centre crops in place of random ones: the features of all images are computed once, and kept in run_dir."""


class Augment(Section):
    """What is done to images with labels, beside crop and flip."""

    rand_augment: str | None = None
    """RandAugment as timm writes it, such as rand-m9-mstd0.5-inc1."""
    random_erasing: Fraction = 0.0
    """Probability that a box of an image becomes noise."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup; 0 for none."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of CutMix; 0 for none."""
    mix_prob: Fraction = 1.0
    """Probability that a micro-batch is mixed."""
    switch_prob: Fraction = 0.5
    """Probability of CutMix where both are on."""
