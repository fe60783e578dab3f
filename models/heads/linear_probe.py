"""Linear probes: classifiers on the pooled features of a frozen encoder, many of them trained at once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models.contract import TrainableEncoder
from mixmae.models.encoders.contract import Encoder

_HEAD_STD = 0.01
_EPS = 1e-6


@dataclass(frozen=True)
class Variant:
    """What sets a classifier apart from the others.

    Attributes:
        stages: so many of the encoder's last stages it sees, their pooled features side by side.
        lr_scale: its learning rate over the schedule's.
    """

    stages: int
    lr_scale: float

    @property
    def name(self) -> str:
        return f"stages{self.stages}_lr{self.lr_scale:g}"


def variants_of(stages: Sequence[int], lr_scales: Sequence[float]) -> list[Variant]:
    """One for each pair."""
    return [Variant(count, scale) for count in stages for scale in lr_scales]


class FeatureNorm(nn.Module):
    """BatchNorm without affine, over the micro-batches of all ranks; its input has no gradient.

    Statistics of all ranks make a run the same to rounding on any number of them, and an evaluation the same on each.

    Args:
        momentum: weight of a batch's statistics in the running ones, as in torch.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, num_features: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, C]."""
        if not self.training:
            return (x - self.mean) * (self.var + _EPS).rsqrt()
        count = torch.full((1,), float(len(x)), device=x.device)
        total, count = _sum_over_ranks(torch.cat([x.sum(0), count])).split([x.shape[1], 1])
        mean = total / count
        squares = _sum_over_ranks((x - mean).square().sum(0))
        self.mean.lerp_(mean, self.momentum)
        self.var.lerp_(squares / (count - 1).clamp(min=1), self.momentum)
        return (x - mean) * (squares / count + _EPS).rsqrt()


def fold_norm(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """A classifier that does to features what the given one does to normalised ones, of which it sees the last.

    Args:
        weight: [classes, C], bias [classes].
        mean, var: those of `FeatureNorm`, [C or more].
    """
    width = weight.shape[1]
    scaled = weight * (var[-width:] + _EPS).rsqrt()
    return scaled, bias - scaled @ mean[-width:]


def _sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1 and not values.is_meta:
        dist.all_reduce(values)
    return values


class LinearProbe(TrainableEncoder):
    """`probe(images, targets, features=None) -> loss`: the mean of all classifiers' cross entropies.

    Each classifier has the gradient of its own cross entropy, so that it learns what it would learn alone.

    Args:
        encoder: without a head; frozen, and always in eval mode.
        variants: a classifier for each.
    """

    min_batch = 2

    def __init__(
        self, encoder: Encoder, num_classes: int, variants: Sequence[Variant], label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.num_classes, self.variants, self.label_smoothing = num_classes, tuple(variants), label_smoothing
        widths = [info["num_chs"] for info in encoder.feature_info]
        self.widths = [sum(widths[-variant.stages :]) for variant in variants]
        self.norm = FeatureNorm(max(self.widths))
        heads = [nn.Linear(width, num_classes) for width in self.widths]
        self.heads = nn.ModuleList(heads)
        for head in heads:
            nn.init.trunc_normal_(head.weight, std=_HEAD_STD)
            nn.init.zeros_(head.bias)

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled features fp32 [B, C] of the stages that any classifier sees, those of the last stage last."""
        model: Any = self.encoder  # by timm's contract
        stages = max(variant.stages for variant in self.variants)
        dtype = next(self.encoder.parameters()).dtype
        maps = model.forward_intermediates(images.to(dtype), indices=stages, norm=True, intermediates_only=True)
        return torch.cat([part.float().mean((2, 3)) for part in maps], dim=1)

    def forward(self, images: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The loss of normalised images [B, 3, H, W], or of their features, with classes int64 [B]."""
        x = self.features(images) if features is None else features
        losses = [F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing) for logits in self.logits(x)]
        total = torch.stack(losses).sum()
        return total + (total / len(losses) - total).detach()

    def logits(self, features: Tensor) -> list[Tensor]:
        """Of each classifier, fp32 [B, classes]."""
        x = self.norm(features)
        return [head(x[:, -width:]).float() for head, width in zip(self.heads, self.widths, strict=True)]

    def set_grad_checkpointing(self, groups: Collection[str]) -> None:
        """Nothing: a frozen encoder has no backward pass."""
