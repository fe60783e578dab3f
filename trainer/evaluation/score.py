"""What a classifier's answers are worth: top-1, top-5, per class, and the confusion matrix with its picture."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmae.base.errors import UsageError

_NAMED = 40
"""Classes up to which a picture names each."""


@dataclass(frozen=True)
class Score:
    """Answers beside the truth.

    Attributes:
        ranked: int64 [N, k], the classes that were named for each image, best first.
        true: int64 [N].
    """

    ranked: Tensor
    true: Tensor
    num_classes: int

    def top(self, k: int) -> float:
        """The share of images whose class is among the first k."""
        return float((self.ranked[:, :k] == self.true[:, None]).any(1).double().mean())

    def confusion(self) -> Tensor:
        """int64 [classes, classes]: images of class i that were taken for class j."""
        pairs = self.true * self.num_classes + self.ranked[:, 0]
        return torch.bincount(pairs, minlength=self.num_classes**2).view(self.num_classes, self.num_classes)

    def images(self) -> Tensor:
        """int64 [classes]: how many there are of each."""
        return torch.bincount(self.true, minlength=self.num_classes)

    def per_class(self) -> Tensor:
        """fp64 [classes]: the share of each class's images that were recognised; NaN where there are none."""
        right = self.ranked[:, 0] == self.true
        return torch.bincount(self.true[right], minlength=self.num_classes).double() / self.images()

    def figures(self, name_of: Callable[[int], str]) -> dict[str, Any]:
        """`top1`, `top5`, and `per_class` of the classes that some image has."""
        found = zip(self.images().tolist(), self.per_class().tolist(), strict=True)
        per_class = [
            {"class": number, "name": name_of(number), "images": images, "top1": share}
            for number, (images, share) in enumerate(found)
            if images
        ]
        return {"top1": self.top(1), "top5": self.top(5), "per_class": per_class}


def require_plots(option: str) -> None:
    """Raises UsageError where pictures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{option} needs matplotlib; install it with: pip install 'mixmae[plots]'")


def draw_confusion(score: Score, name_of: Callable[[int], str], out: Path) -> None:
    """Draws the confusion matrix of the classes that there are, each row as shares of its images.

    Raises:
        UsageError: a kind of file that is unknown, or cannot be written.
    """
    from matplotlib.figure import Figure

    there = torch.unique(torch.cat([score.true, score.ranked[:, 0]]))
    counts = score.confusion()[there][:, there].double()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = max(5.0, min(0.28 * len(there), 0.28 * _NAMED) + 3)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    if len(there) <= _NAMED:
        names = [name_of(int(number)) for number in there]
        axes.set_xticks(range(len(there)), names, rotation=90)
        axes.set_yticks(range(len(there)), names)
    axes.set_xlabel("recognised as")
    axes.set_ylabel("is")
    axes.set_title(f"{len(score.true)} images, top-1 {score.top(1):.1%}")
    figure.colorbar(picture, shrink=0.6, label="share of the class's images")
    try:
        figure.savefig(out, dpi=110)
    except (ValueError, OSError) as error:
        raise UsageError(f"{out}: {error}") from error
