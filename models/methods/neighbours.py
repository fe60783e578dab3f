"""Nearest neighbours as positives: a head with a queue of embeddings, after NNCLR (arXiv 2104.14548) and the objective
of MIM-Refiner (arXiv 2402.10093, section 3.2), in which neighbours stand in for positives and never for negatives.

Shapes: b images of a rank's micro-batch, n of all ranks', D the width of embeddings, which have unit length; Q of them
are in the queue.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Two layers. LayerNorm in place of the papers' BatchNorm: an image's embedding depends on that image alone."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim)
    )


class NeighbourHead(nn.Module):
    """Projector, predictor and queue behind one block.

    The queue is the same on all ranks, and part of checkpoints: a resumed run finds the neighbours that it would have.
    """

    queue: Tensor
    begin: Tensor

    def __init__(self, in_dim: int, hidden_dim: int, dim: int, queue_size: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.norm = nn.LayerNorm(in_dim)
        self.projector = mlp(in_dim, hidden_dim, dim)
        self.predictor = mlp(dim, hidden_dim, dim)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("begin", torch.zeros(1, dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        """The loss, an fp32 scalar, of pooled features [2b, C], those of first views before those of second ones."""
        projected = self.projector(self.norm(features))
        predicted = F.normalize(self.predictor(projected).float(), dim=1).chunk(2)
        projected = F.normalize(projected.detach().float(), dim=1)
        everyones, first = _of_all_ranks(projected), _rank() * (len(projected) // 2)
        neighbours = self._neighbours(projected).chunk(2)
        losses = [
            neighbour_loss(predicted[1 - view], neighbours[view], everyones[view], self.temperature, first)
            for view in (0, 1)
        ]
        if self.training and torch.is_grad_enabled():
            self._put(everyones[0])
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _neighbours(self, embeddings: Tensor) -> Tensor:
        nearest = (embeddings.to(self.queue.dtype) @ self.queue.t()).argmax(dim=1)
        return F.normalize(self.queue.index_select(0, nearest).float(), dim=1)

    @torch.no_grad()
    def _put(self, embeddings: Tensor) -> None:
        """In the place of the oldest ones."""
        newest = embeddings[-len(self.queue) :].nan_to_num()  # a step that is skipped leaves nothing that stays
        places = (self.begin + torch.arange(len(newest), device=newest.device)) % len(self.queue)
        self.queue.index_copy_(0, places, newest.to(self.queue.dtype))
        self.begin.add_(len(newest)).remainder_(len(self.queue))


def neighbour_loss(anchors: Tensor, neighbours: Tensor, negatives: Tensor, temperature: float, first: int) -> Tensor:
    """Cross entropy of telling an image's neighbour from the embeddings of all other images.

    Args:
        anchors: of one view, [b, D]; the only ones with a gradient.
        neighbours: of the other view's embeddings, [b, D].
        negatives: the other view's embeddings, [n, D], of which those from `first` on are of the anchors' images.
    """
    own = torch.arange(first, first + len(anchors), device=anchors.device)
    positive = (anchors * neighbours).sum(1, keepdim=True)
    similarity = (anchors @ negatives.t()).scatter(1, own[:, None], positive)
    return F.cross_entropy(similarity / temperature, own)


def _of_all_ranks(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """First views [n, D] and second views [n, D] of all ranks, in the order of ranks."""
    gathered = [embeddings]
    if dist.is_initialized() and dist.get_world_size() > 1 and not embeddings.is_meta:
        gathered = [torch.empty_like(embeddings) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, embeddings.contiguous())
    first, second = torch.stack([each.unflatten(0, (2, -1)) for each in gathered], dim=1).flatten(1, 2)
    return first, second


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
