"""A linear classifier in closed form: ridge regression of one-hot classes, its penalty chosen by leaving one out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHAS = tuple(10.0**power for power in range(-2, 6))


@dataclass(frozen=True)
class Ridge:
    """`x @ weight + bias`, the largest of which is the class.

    Attributes:
        alpha: the penalty on squared weights that was chosen.
    """

    weight: Tensor
    bias: Tensor
    alpha: float

    def predict(self, x: Tensor) -> Tensor:
        return (x.double() @ self.weight + self.bias).argmax(1)


def fit_ridge(x: Tensor, labels: Tensor, num_classes: int, alphas: Sequence[float] = ALPHAS) -> Ridge:
    """Fits features [N, C] to labels [N]; of `alphas` the one with the least squared error on left-out images.

    One decomposition gives the solution, and each image's prediction by a fit without it, for every penalty (Hastie et
    al., Elements of Statistical Learning, 7.10). In fp64.
    """
    mean = x.double().mean(0)
    centred = x.double() - mean
    targets = F.one_hot(labels, num_classes).double()
    share = targets.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    rotated = centred @ vectors
    correlation = rotated.T @ (targets - share)

    def left_out_error(alpha: float) -> float:
        inverse = 1 / (values.clamp(min=0) + alpha)
        fitted = share + rotated @ (inverse[:, None] * correlation)
        leverage = rotated.square() @ inverse + 1 / len(x)  # the mean is fitted too
        return float(((targets - fitted) / (1 - leverage)[:, None].clamp(min=1e-9)).square().mean())

    alpha = min(alphas, key=left_out_error)
    weight = vectors @ (correlation / (values.clamp(min=0) + alpha)[:, None])
    return Ridge(weight, share - mean @ weight, alpha)
