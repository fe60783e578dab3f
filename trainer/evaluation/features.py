"""Pooled features of a frozen encoder, and whether they collapsed: measures that need no labels."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmae.models.encoders.contract import Encoder
from mixmae.trainer.evaluation.held_out import HeldOut


def pooled(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """What gives an encoder's features of unmixed images, averaged over positions: fp32 [B, C].

    Args:
        encoder: built without a head and pooling, as methods have it; its weights may be in bf16.
    """
    dtype = next(encoder.parameters()).dtype
    return lambda images: encoder(images.to(dtype)).float().mean((1, 2))


@torch.no_grad()
def features_of(
    pool: Callable[[Tensor], Tensor], batches: Iterable[HeldOut], to_device: Callable[[Tensor], Tensor]
) -> Tensor:
    """Features fp32 [n, C], on the device, of this rank's share of the images; each is computed once.

    Args:
        pool: images [B, 3, H, W] to features [B, C].
        batches: of `held_out_batches`.
    """
    return torch.cat([pool(to_device(images))[: len(samples)].float() for images, samples, _ in batches])


def effective_rank(x: Tensor) -> float:
    """Dimensions that features [N, C] use: exp of the entropy of their normalised singular values.

    From 1, where all are multiples of one vector, to min(N, C). RankMe (arXiv 2210.02885), which leaves the mean in.
    """
    squared = torch.linalg.eigvalsh(x.double().T @ x.double()).clamp(min=0)
    share = squared.sqrt() / squared.sqrt().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def mean_cosine(x: Tensor) -> float:
    """Mean cosine between the features [N, C] of two different images; 1 where all point the same way."""
    directions = F.normalize(x.double(), dim=1)
    total, own = directions.sum(0).square().sum(), directions.square().sum()
    return float((total - own) / (len(x) * (len(x) - 1)))
