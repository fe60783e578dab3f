"""What a classifier is worth where an image has any number of classes: mAP, F1, and figures of each class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GIVEN = 0.5
"""Probability from which on a class counts as given, as while the classifier was trained."""


@dataclass(frozen=True)
class MultiLabelScore:
    """Answers beside the truth.

    Attributes:
        probabilities: fp32 [N, classes].
        true: bool [N, classes].
    """

    probabilities: Tensor
    true: Tensor

    def f1(self) -> float:
        """Of all decisions together (micro-averaged)."""
        given = self.probabilities > _GIVEN
        right, wrong = (given & self.true).sum(), (given ^ self.true).sum()
        return float(2 * right / (2 * right + wrong).clamp(min=1))

    def average_precision(self) -> Tensor:
        """fp64 [classes]; NaN where no image has the class."""
        pairs = zip(self.probabilities.T, self.true.T, strict=True)
        return torch.stack([average_precision(of_class, true) for of_class, true in pairs])

    def figures(self, name_of: Callable[[int], str]) -> dict[str, Any]:
        """`mAP` (the mean over classes that some image has), `f1`, and `per_class`."""
        given, precisions = self.probabilities > _GIVEN, self.average_precision()
        right, counts = (given & self.true).sum(0), self.true.sum(0)
        found = zip(precisions.tolist(), counts.tolist(), right.tolist(), given.sum(0).tolist(), strict=True)
        per_class = [
            {
                "class": number,
                "name": name_of(number),
                "images": images,
                "AP": precision,
                "precision": hits / named if named else 0.0,
                "recall": hits / images,
            }
            for number, (precision, images, hits, named) in enumerate(found)
            if images
        ]
        return {"mAP": float(precisions.nanmean()), "f1": self.f1(), "per_class": per_class}


def average_precision(scores: Tensor, true: Tensor) -> Tensor:
    """The sum of precisions at each threshold, weighted by what recall gains there; fp64, NaN where nothing is true.

    Args:
        scores: fp32 [N]; equal ones are one threshold.
        true: bool [N].
    """
    scores, order = scores.sort(descending=True)
    last = torch.cat([scores.diff() != 0, torch.ones(1, dtype=torch.bool)])
    hits, named = true[order].double().cumsum(0)[last], last.nonzero()[:, 0] + 1
    gained = hits.diff(prepend=hits.new_zeros(1)) / hits[-1]
    return (gained * hits / named).sum()
