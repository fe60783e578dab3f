"""k nearest neighbours by cosine, the known features spread over all ranks (as in DINO, arXiv 2104.14294, app. F)."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mixmae.trainer.engine.distributed import Ranks

_QUERIES = 1024
"""Queries at once: with 1.3 million known features a chunk's similarities take 5 GB on one rank, less on more."""
_TEMPERATURE = 0.07


class Bank(NamedTuple):
    """Labelled features: of each rank its share, of any size."""

    x: Tensor
    """[n, C], not necessarily of unit length."""
    labels: Tensor
    """int64 [n], on the same device."""


class Neighbours(NamedTuple):
    """The nearest features of each query, nearest first."""

    cosine: Tensor
    """[Q, k]; minus infinity where there are fewer than k."""
    labels: Tensor
    """int64 [Q, k]."""


def nearest(bank: Bank, queries: Tensor, k: int, ranks: Ranks) -> Neighbours:
    """The k nearest of all ranks' banks to each query [Q, C]; the same queries on every rank, and the same answer."""
    known = F.normalize(bank.x, dim=1)
    chunks = []
    for part in queries.split(_QUERIES):
        found = _nearest_here(known, bank.labels, F.normalize(part, dim=1), k)
        chunks.append(found if ranks.world_size == 1 else _nearest_of_all(found, ranks.world_size))
    return Neighbours(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _nearest_here(known: Tensor, labels: Tensor, queries: Tensor, k: int) -> Neighbours:
    cosine, at = (queries @ known.T).topk(min(k, len(known)), dim=1)
    missing = k - cosine.shape[1]
    return Neighbours(F.pad(cosine, (0, missing), value=-torch.inf), F.pad(labels[at], (0, missing)))


def _nearest_of_all(found: Neighbours, world_size: int) -> Neighbours:
    everywhere = Neighbours(*(torch.cat(_all_gather(part, world_size), dim=1) for part in found))
    cosine, at = everywhere.cosine.topk(found.cosine.shape[1], dim=1)
    return Neighbours(cosine, everywhere.labels.gather(1, at))


def _all_gather(part: Tensor, world_size: int) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(world_size)]
    dist.all_gather(parts, part.contiguous())
    return parts


def ranking(neighbours: Neighbours, k: int, num_classes: int, top: int = 1) -> Tensor:
    """Classes by the votes of the first k neighbours, each of weight exp(cosine / 0.07): int64 [Q, top], best first."""
    # Relative to the nearest, so that no weight is too small for fp32.
    weight = ((neighbours.cosine[:, :k] - neighbours.cosine[:, :1]) / _TEMPERATURE).exp()
    chunks = zip(weight.split(_QUERIES), neighbours.labels[:, :k].split(_QUERIES), strict=True)
    return torch.cat([_votes(part, labels, num_classes).topk(top, dim=1).indices for part, labels in chunks])


def _votes(weight: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return weight.new_zeros(len(weight), num_classes).scatter_add_(1, labels, weight)
