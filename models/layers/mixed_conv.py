"""Convolution and max pooling of mixed images: a position sees positions of its own group only.

A mixed convolution (MixMAE, supplement A.3) is a partial convolution (Liu et al. 2018) for each group over the
positions of that group, of which each position keeps its own group's: absent inputs count as zero, and the sum is
multiplied by the kernel's area over the inputs that are present. What pads the image is absent, too.

K partial convolutions cost K times a plain one. These cost about as much as one, whatever K is: large cells, with their
halos, are the batch of a plain convolution; for small ones, where halos would be most of it, inputs are gathered for
each position, and the convolution is a product of matrices.

Maps are [B, H, W, C]; Gh*Gw cells of h*w positions; b is 1 for a map of groups that the micro-batch shares, or B.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models.layers.mixed_cells import Mix, Tiles, join_cells

_TILED_FROM = 8
"""Positions along a cell's side from which a cell with its halo is cheaper than inputs gathered for each position."""


def mixed_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, mix: Mix) -> Tensor:
    """[B, H, W, C] -> [B, H/stride, W/stride, O], padded so that position 0 lies under the kernel's centre.

    Args:
        weight: [O, C, k, k], or [C, 1, k, k] for a depthwise convolution; k is odd and k // 2 not above a cell's side.
    """
    kernel, depthwise = weight.shape[-1], weight.shape[1] == 1
    cell = (x.shape[1] // mix.cells[0], x.shape[2] // mix.cells[1])
    assert kernel % 2 == 1
    assert kernel // 2 <= min(cell)
    assert cell[0] % stride == 0
    assert cell[1] % stride == 0
    if depthwise or min(cell) >= _TILED_FROM:
        out = _by_cell(x, weight, stride, mix.neighbours)
    else:
        out = _Gathered.apply(x, weight, _present(mix.neighbours, cell, kernel, stride), stride)
    rescale = _rescale(mix.neighbours, cell, kernel, stride, x.dtype)
    return out * rescale if bias is None else torch.addcmul(bias, out, rescale)


def mixed_max_pool2d(x: Tensor, kernel: int, stride: int, mix: Mix) -> Tensor:
    """The maximum over positions of the own group, as `mixed_conv2d` places its kernel."""
    halo = (kernel // 2, kernel // 2 + 1 - stride)
    tiles = Tiles.apply(x, mix.neighbours, *halo, float("-inf"))
    out = F.max_pool2d(tiles.flatten(0, 2).permute(0, 3, 1, 2), kernel, stride)
    return join_cells(out, mix.cells)


class MixedConv2d(nn.Conv2d):
    """A convolution of maps [B, H, W, C], of odd kernel and padded by half of it, that can keep groups apart."""

    def __init__(
        self, in_dim: int, dim: int, kernel: int, stride: int = 1, bias: bool = True, depthwise: bool = False
    ) -> None:
        super().__init__(in_dim, dim, kernel, stride, kernel // 2, groups=in_dim if depthwise else 1, bias=bias)

    def forward(self, x: Tensor, mix: Mix | None = None) -> Tensor:
        """Unmixed, or with groups kept apart."""
        stride = self.stride[0]
        if mix is not None and self.kernel_size != (1, 1):
            return mixed_conv2d(x, self.kernel(), self.bias, stride, mix)
        if self.kernel_size == (1, 1):
            return F.linear(x[:, ::stride, ::stride], self.kernel().flatten(1), self.bias)
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, self.kernel(), self.bias, stride, self.padding, groups=self.groups)
        return x.permute(0, 2, 3, 1)

    def kernel(self) -> Tensor:
        return self.weight


class StandardisedConv2d(MixedConv2d):
    """A convolution without bias, of kernels of zero mean and unit variance (Qiao et al. 2019)."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int = 1, eps: float = 1e-10) -> None:
        super().__init__(in_dim, dim, kernel, stride, bias=False)
        self.eps = eps

    def kernel(self) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return (self.weight - mean) * (var + self.eps).rsqrt()


def _by_cell(x: Tensor, weight: Tensor, stride: int, neighbours: Tensor) -> Tensor:
    """The convolution of each cell with its halo."""
    kernel = weight.shape[-1]
    tiles = Tiles.apply(x, neighbours, kernel // 2, kernel // 2 + 1 - stride, 0.0)
    conv_groups = weight.shape[0] if weight.shape[1] == 1 else 1
    out = F.conv2d(tiles.flatten(0, 2).permute(0, 3, 1, 2), weight, stride=stride, groups=conv_groups)
    return join_cells(out, (neighbours.shape[1], neighbours.shape[2]))


class _Gathered(torch.autograd.Function):
    """The convolution as a product of matrices. Inputs are gathered again in the backward pass: nine times the map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, present: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight, present)
        ctx.stride = stride
        columns = _gather(x, present, weight.shape[-1], stride)
        return columns @ weight.permute(2, 3, 1, 0).flatten(0, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, present = ctx.saved_tensors
        (grad,) = gradients
        kernel, dim = weight.shape[-1], x.shape[-1]
        columns = _gather(x, present, kernel, ctx.stride)
        grad_weight = grad.flatten(0, 2).t() @ columns.flatten(0, 2)
        del columns  # before their gradient, which is as large
        grad_columns = (grad @ weight.permute(0, 2, 3, 1).flatten(1)).unflatten(-1, (kernel**2, dim))
        half = kernel // 2
        padded = x.new_zeros(x.shape[0], x.shape[1] + 2 * half, x.shape[2] + 2 * half, dim)
        for tap, (rows, cols) in enumerate(_taps(x, kernel, ctx.stride)):
            padded[:, rows, cols] += grad_columns[..., tap, :] * present[..., tap, None]
        grad_x = padded[:, half : half + x.shape[1], half : half + x.shape[2]]
        return grad_x, grad_weight.unflatten(1, (kernel, kernel, dim)).permute(0, 3, 1, 2), None, None


def _gather(x: Tensor, present: Tensor, kernel: int, stride: int) -> Tensor:
    """[B, H/stride, W/stride, k*k*C]: what each position sees."""
    half = kernel // 2
    padded = F.pad(x, (0, 0, half, half, half, half))
    out = x.new_empty(*x.shape[:1], x.shape[1] // stride, x.shape[2] // stride, kernel**2, x.shape[3])
    for tap, (rows, cols) in enumerate(_taps(x, kernel, stride)):
        out[..., tap, :] = padded[:, rows, cols] * present[..., tap, None]  # with out= torch.compile stops at the view
    return out.flatten(3)


def _taps(x: Tensor, kernel: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Where in the padded map each element of the kernel finds its inputs."""
    for dy, dx in product(range(kernel), range(kernel)):
        yield slice(dy, dy + x.shape[1], stride), slice(dx, dx + x.shape[2], stride)


def _present(neighbours: Tensor, cell: tuple[int, int], kernel: int, stride: int) -> Tensor:
    """[b, H/stride, W/stride, k*k]: whether an element of the kernel finds an input of the position's group."""
    rows, cols = (_neighbour(side, kernel, stride, neighbours.device) for side in cell)
    seen = neighbours[:, :, :, rows[:, None, :, None], cols[None, :, None, :]]
    return seen.transpose(2, 3).flatten(5).flatten(3, 4).flatten(1, 2)


def _rescale(neighbours: Tensor, cell: tuple[int, int], kernel: int, stride: int, dtype: torch.dtype) -> Tensor:
    """[b, H/stride, W/stride, 1]: the kernel's area over the number of inputs that are present."""
    rows, cols = (F.one_hot(_neighbour(side, kernel, stride, neighbours.device), 3).sum(1).float() for side in cell)
    count = rows @ neighbours.float()[:, :, :, None].flatten(3, 4) @ cols.t()
    count = count.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return kernel**2 / count.to(dtype)[..., None]


def _neighbour(side: int, kernel: int, stride: int, device: torch.device) -> Tensor:
    """[side/stride, k]: in which cell an element of the kernel lies, along one side: 0 before, 1 the same, 2 after."""
    at = torch.arange(0, side, stride, device=device)[:, None] + torch.arange(kernel, device=device) - kernel // 2
    return (at >= 0).long() + (at >= side).long()
