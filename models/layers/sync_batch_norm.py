"""BatchNorm of maps whose statistics are those of all ranks, with any backend: torch's own works on GPUs alone."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

_PLANES = (0, 2, 3)


class SyncBatchNorm2d(nn.Module):
    """`nn.BatchNorm2d`, over the micro-batches of all ranks together; on one rank it is that.

    Statistics and what is computed of them are fp32, whatever the dtype of maps and weights. All ranks call it together
    with maps of one shape, as the steps of a run do. Running statistics are then the same on all ranks.

    Args:
        momentum: weight of a batch's statistics in the running ones, as in torch.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W]."""
        weight, bias = self.weight.float(), self.bias.float()
        if self.training and _world_size() > 1 and not x.is_meta:
            out, mean, var = _SyncBatchNorm.apply(x, weight, bias, self.eps)
            count = x[:, 0].numel() * _world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
            return out
        return F.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
        )


class _SyncBatchNorm(torch.autograd.Function):
    """Normalised maps, and the mean and variance [C] of all ranks, which have no gradient of their own.

    The gradient is that of the sum of all ranks' losses; an engine that averages gradients makes it that of their mean.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        own_var, own_mean = torch.var_mean(x.float(), _PLANES, correction=0)
        mean = _mean_over_ranks(own_mean.clone())
        var = _mean_over_ranks(own_var + (own_mean - mean).square())
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, var = ctx.saved_tensors
        # As if mean and variance were given: dy * weight / std, and the sums of dy * normalised x and of dy.
        gradient = gradients[0].contiguous(memory_format=_format(x))
        direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient,
            x,
            weight,
            mean,
            var,
            None,
            None,
            False,
            ctx.eps,
            (True,) * 3,
        )
        across = _mean_over_ranks(torch.stack([of_weight, of_bias])) / x[:, 0].numel()
        scale = weight * (var + ctx.eps).rsqrt()
        slope = scale * across[0] * (var + ctx.eps).rsqrt()
        offset = scale * across[1] - slope * mean
        through = torch.addcmul(_planes(offset), x, _planes(slope))
        return (direct - through).to(x.dtype), of_weight, of_bias, None


def _format(x: Tensor) -> torch.memory_format:
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


def _planes(values: Tensor) -> Tensor:
    return values[:, None, None]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _mean_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values.div_(_world_size())
