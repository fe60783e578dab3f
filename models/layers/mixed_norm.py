"""GroupNorm of mixed images: statistics are those of the positions of a group.

Maps are [B, H, W, C]; Gh*Gw cells of h*w positions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models.layers.mixed_cells import Mix


class MixedGroupNormReLU(nn.GroupNorm):
    """GroupNorm and ReLU of maps [B, H, W, C]; statistics of mixed ones are those of a position's own group."""

    def forward(self, x: Tensor, mix: Mix | None = None) -> Tensor:
        if mix is None:
            normed = F.group_norm(x.permute(0, 3, 1, 2), self.num_groups, self.weight, self.bias, self.eps)
            return normed.permute(0, 2, 3, 1).relu()
        settings = (mix.shares, mix.cells, self.num_groups, self.eps)
        return _MixedNormReLU.apply(x, self.weight, self.bias, *settings)


class _MixedNormReLU(torch.autograd.Function):
    """Passes over the map are what it costs: their number is kept low, and only the input and the output are kept.

    In the names below: `m` are means over a cell, fp32 [B, Gh*Gw, C] or, by a norm's group of channels, [.., n, C/n];
    the rest are of a group of channels and the own group of cells, [B, Gh*Gw, n, 1].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shares: Tensor, cells: tuple[int, int], n: int, eps: float
    ) -> Tensor:
        wide = x.float()
        mean = _over_group(_cell_means(wide, cells, n), shares)
        var = (_over_group(_cell_means(wide.square(), cells, n), shares) - mean.square()).clamp_(min=0)
        rstd = (var + eps).rsqrt()
        scale = rstd * weight.view(n, -1)
        out = _affine(x, scale, bias.view(n, -1) - mean * scale, cells).to(x.dtype).relu_()
        ctx.save_for_backward(x, out, weight, shares, mean, rstd)
        ctx.cells = cells
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, out, weight, shares, mean, rstd = ctx.saved_tensors
        cells, n = ctx.cells, mean.shape[2]
        weights = weight.view(n, -1)
        grad = torch.ops.aten.threshold_backward(gradients[0], out, 0).float()  # of the ReLU
        m_grad = _cell_means(grad, cells, n)
        m_both = (_cell_means(grad * x, cells, n) - mean * m_grad) * rstd  # with the normalised input
        positions = x.shape[1] * x.shape[2] // shares.shape[-1]
        grad_weight = m_both.sum((0, 1)).flatten() * positions
        grad_bias = m_grad.sum((0, 1)).flatten() * positions
        slope = -rstd.square() * _over_group(m_both * weights, shares)
        level = -rstd * _over_group(m_grad * weights, shares) - mean * slope
        grad_x = _affine(grad, rstd * weights, level, cells).add_(_affine(x, slope, None, cells))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None, None


def _cell_means(x: Tensor, cells: tuple[int, int], n: int) -> Tensor:
    """[B, Gh*Gw, n, C/n] of a map. Pooling is several times as fast as a mean over two dimensions."""
    kernel = (x.shape[1] // cells[0], x.shape[2] // cells[1])
    means = F.avg_pool2d(x.permute(0, 3, 1, 2), kernel).permute(0, 2, 3, 1)
    return means.flatten(1, 2).unflatten(-1, (n, -1))


def _over_group(means: Tensor, shares: Tensor) -> Tensor:
    """The mean over channels and over a cell's group, [B, Gh*Gw, n, 1]."""
    return (shares @ means.mean(-1))[..., None]


def _affine(x: Tensor, scale: Tensor, shift: Tensor | None, cells: tuple[int, int]) -> Tensor:
    """A map times a scale, plus a shift, [B, Gh*Gw, n, C/n or 1] each, in fp32."""
    parts = x.unflatten(2, (cells[1], -1)).unflatten(1, (cells[0], -1))

    def spread(values: Tensor) -> Tensor:
        values = values.expand(-1, -1, -1, x.shape[-1] // values.shape[2])
        return values.flatten(-2).unflatten(1, cells)[:, :, None, :, None]

    if shift is not None and x.dtype == scale.dtype:
        out = torch.addcmul(spread(shift), parts, spread(scale))
    else:
        out = parts * spread(scale) if shift is None else parts * spread(scale) + spread(shift)
    return out.flatten(3, 4).flatten(1, 2)
