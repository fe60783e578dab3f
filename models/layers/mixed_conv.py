"""Convolution, max pooling and GroupNorm of mixed images: a position sees positions of its own group only.

A mixed convolution (MixMAE, supplement A.3) is a partial convolution (Liu et al. 2018) for each group over the
positions of that group, of which each position keeps its own group's: absent inputs count as zero, and the sum is
multiplied by the kernel's area over the inputs that are present. What pads the image is absent, too.

K partial convolutions cost K times a plain one. These cost about as much as one, whatever K is. Groups are whole cells,
so all positions of a cell have the same inputs: the cell with a halo of its eight neighbours, where those of other
groups are blank. Large cells, with their halos, are the batch of a plain convolution; for small ones, where halos would
be most of it, inputs are gathered for each position, and the convolution is a product of matrices.

Maps are [B, H, W, C]; Gh*Gw cells of h*w positions; b is 1 for a map of groups that the micro-batch shares, or B.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TILED_FROM = 8
"""Positions along a cell's side from which a cell with its halo is cheaper than inputs gathered for each position."""


class Mix(NamedTuple):
    """What cells share.

    neighbours: bool [b, Gh, Gw, 3, 3], whether the cells around, and the cell itself, are there and of its group.
    shares: fp32 [b, Gh*Gw, Gh*Gw], the weight of each cell (last) in the mean over a cell's group.
    """

    neighbours: Tensor
    shares: Tensor

    @classmethod
    def of(cls, groups: Tensor) -> "Mix":
        """For groups [Gh, Gw] or [B, Gh, Gw]."""
        groups = groups.view(-1, *groups.shape[-2:])
        around = F.pad(groups, (1, 1, 1, 1), value=-1).unfold(1, 3, 1).unfold(2, 3, 1)
        flat = groups.flatten(1)
        same = (flat[:, :, None] == flat[:, None, :]).float()
        return cls(around == groups[..., None, None], same / same.sum(-1, keepdim=True))

    @property
    def cells(self) -> tuple[int, int]:
        return (self.neighbours.shape[1], self.neighbours.shape[2])


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
    tiles = _Tiles.apply(x, mix.neighbours, *halo, float("-inf"))
    out = F.max_pool2d(tiles.flatten(0, 2).permute(0, 3, 1, 2), kernel, stride)
    return _untile(out, mix.cells)


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


def _by_cell(x: Tensor, weight: Tensor, stride: int, neighbours: Tensor) -> Tensor:
    """The convolution of each cell with its halo."""
    kernel = weight.shape[-1]
    tiles = _Tiles.apply(x, neighbours, kernel // 2, kernel // 2 + 1 - stride, 0.0)
    conv_groups = weight.shape[0] if weight.shape[1] == 1 else 1
    out = F.conv2d(tiles.flatten(0, 2).permute(0, 3, 1, 2), weight, stride=stride, groups=conv_groups)
    return _untile(out, (neighbours.shape[1], neighbours.shape[2]))


def _untile(tiles: Tensor, cells: tuple[int, int]) -> Tensor:
    """[B*Gh*Gw, C, h, w] -> [B, Gh*h, Gw*w, C]."""
    x = tiles.permute(0, 2, 3, 1).unflatten(0, (-1, *cells)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


class _Tiles(torch.autograd.Function):
    """Cells with halos, [B, Gh, Gw, before + h + after, before + w + after, C].

    Of `before` positions above and to the left and `after` ones below and to the right; `fill` stands where the
    neighbour is none, or of another group. The gradient is written out since that of torch's unfolding is slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, neighbours: Tensor, before: int, after: int, fill: float) -> Tensor:
        ctx.save_for_backward(neighbours)
        ctx.halo = (before, after)
        cells = _cells(x, neighbours)
        batch, rows, cols, height, width, dim = cells.shape
        out = x.new_empty(batch, rows, cols, before + height + after, before + width + after, dim)
        out[:, :, :, before : before + height, before : before + width] = cells
        out[:, 0, :, :before] = out[:, -1, :, before + height :] = fill
        out[:, :, 0, :, :before] = out[:, :, -1, :, before + width :] = fill
        for to, source, same in _halo(neighbours, (height, width), before, after):
            out[to] = _seen(cells[source], same, fill)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (neighbours,) = ctx.saved_tensors
        before, after = ctx.halo
        (grad,) = gradients
        batch, rows, cols, height, width, dim = grad.shape
        height, width = height - before - after, width - before - after
        out = grad.new_empty(batch, rows * height, cols * width, dim)
        cells = _cells(out, neighbours)
        cells.copy_(grad[:, :, :, before : before + height, before : before + width])
        for to, source, same in _halo(neighbours, (height, width), before, after):
            cells[source] += _seen(grad[to], same, 0.0)
        return out, None, None, None, None


def _seen(x: Tensor, same: Tensor, fill: float) -> Tensor:
    """Finite values where they are of the cell's group, elsewhere `fill`: 0, or minus infinity.

    By arithmetic, several times as fast as a choice whose condition is the same along a cell.
    """
    if fill == 0:
        return x * same.to(x.dtype)
    return x + torch.zeros_like(same, dtype=x.dtype).masked_fill_(~same, fill)


def _cells(x: Tensor, neighbours: Tensor) -> Tensor:
    """A view [B, Gh, Gw, h, w, C] of a contiguous map."""
    rows, cols = neighbours.shape[1:3]
    batch, height, width, dim = x.shape
    return x.view(batch, rows, height // rows, cols, width // cols, dim).transpose(2, 3)


def _halo(
    neighbours: Tensor, cell: tuple[int, int], before: int, after: int
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], Tensor]]:
    """For each neighbour: where its part of the halo lies in a tile, where in the neighbour, and whether it is seen."""

    def along(side: int, step: int) -> tuple[slice, slice, slice, slice]:
        """Cells that have such a neighbour, the neighbours, the halo's positions in the tile and in the neighbour."""
        if step < 0:
            return slice(1, None), slice(None, -1), slice(0, before), slice(side - before, side)
        if step > 0:
            return slice(None, -1), slice(1, None), slice(before + side, None), slice(0, after)
        return slice(None), slice(None), slice(before, before + side), slice(None)

    steps = [step for step, width in ((-1, before), (0, 1), (1, after)) if width]
    for dy, dx in product(steps, steps):
        if (dy, dx) != (0, 0):
            row, next_row, to_y, from_y = along(cell[0], dy)
            col, next_col, to_x, from_x = along(cell[1], dx)
            everything = slice(None)
            same = neighbours[:, row, col, dy + 1, dx + 1, None, None, None]
            yield (everything, row, col, to_y, to_x), (everything, next_row, next_col, from_y, from_x), same


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
