"""Attention within the problems of an arrangement, with a learned relative-position bias (MixMAE section 3.3).

Shapes: tokens [B, L, C] in the stage's order; h heads of width d.
"""

import copy
from collections.abc import Callable

import torch
import torch.fx
from timm.layers import resize_rel_pos_bias_table_simple
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from mixmae.models.layers.token_order import Arrangement, Problems, by_window, relative_position_index, separated
from mixmae.models.ops import sdpa

MAX_SIZES = {2: 128, 4: 64}
"""By bytes of an element: tokens of a problem with a bias of its own whose attention matrix lies in a GPU's registers,
and what its products read in shared memory."""
MAX_WINDOWS = {2: 16, 4: 8}
"""The same of the side of windows."""
WIDTHS = (16, 32)
"""Of heads, for which both kernels are made."""
_MAX_ERROR = 0.05
"""Of the window kernel beside torch's attention, relative to the norm: bf16 is off by less than 0.02."""
Kernel = Callable[[Tensor, Tensor, float], Tensor]
"""Packed queries, keys and values [B, num * size, 3C], bias [num, h, size, size], and scale to [B, num * size, C]."""
WindowKernel = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
"""The same with the bias table, and members of groups or None, in place of the bias."""


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows of side `window`; a window as large as the map is global attention."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed dim {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.window = window
        self.kernel: Kernel | None = None
        self.window_kernel: WindowKernel | None = None
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, arrangement: Arrangement) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        if len(arrangement.problems) == 1:
            return self.proj(self.attend(self.qkv(x), arrangement.problems[0]))
        parts = self.qkv(x).split([problems.tokens for problems in arrangement.problems], dim=1)
        out = [self.attend(part, problems) for part, problems in zip(parts, arrangement.problems, strict=True)]
        return self.proj(torch.cat(out, dim=1))

    def set_window(self, window: int) -> None:
        """Another window side; the bias table is resized."""
        self.window = window
        table = self.relative_position_bias_table
        if len(table) != (2 * window - 1) ** 2:
            self.relative_position_bias_table = nn.Parameter(resize_table(table.detach(), window))

    def fuses_windows(self, dtype: torch.dtype) -> bool:
        """Whether windows go through `window_kernel`.

        Args:
            dtype: of queries, keys and values.
        """
        return self.window_kernel is not None and self.window <= MAX_WINDOWS.get(dtype.itemsize, 0)

    def use_kernels(self, kernel: Kernel, window_kernel: WindowKernel | None, dtype: torch.dtype) -> str:
        """Attention in kernels where they apply.

        Returns:
            Why none of them does, or not that of windows; empty if they do.
        """
        width = self.proj.in_features // self.num_heads
        if width not in WIDTHS:
            return f"heads are {width} wide, expected {' or '.join(map(str, WIDTHS))}"
        self.kernel, self.window_kernel = kernel, window_kernel
        if window_kernel is not None and not self.fuses_windows(dtype):
            self.window_kernel, most = None, MAX_WINDOWS.get(dtype.itemsize, 0)
            return f"windows of {self.window}x{self.window} in {dtype}, expected a side of {most} or less"
        reason = kernel_failure(self, dtype)
        if reason:  # groups go through the same code
            self.kernel = self.window_kernel = None
        return reason

    def attend(self, qkv: Tensor, problems: Problems) -> Tensor:
        """[B, num * size, 3C] -> [B, num * size, C]."""
        if problems.are_windows and self.window_kernel is not None and self.fuses_windows(qkv.dtype):
            return self.window_kernel(qkv, self.relative_position_bias_table, problems.members, self.scale)
        assert problems.members is None, "groups are kept apart by a mask where there is no kernel"
        bias = position_bias(self.relative_position_bias_table, problems.pairs, problems.size)
        one_bias = problems.is_shared
        own_bias = not one_bias or problems.num == 1
        if self.kernel is not None and own_bias and problems.is_dense and _fits(problems.size, qkv):
            return self.kernel(qkv, bias, self.scale)
        qkv = qkv.unflatten(2, (3, self.num_heads, -1)).unflatten(1, (problems.num, problems.size))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        if problems.bias is not None:
            bias = bias + problems.bias
            one_bias = problems.num == 1
        if problems.query_codes is not None and problems.key_codes is not None:
            q, k = _append(q, problems.query_codes), _append(k, problems.key_codes)
        if one_bias:
            out = sdpa.attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias, self.scale)
        else:
            # Problems differ in their bias, samples do not: problems stand beside the heads.
            joint = bias.flatten(0, 1)[None]
            out = sdpa.attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), joint, self.scale)
        width = self.proj.in_features // self.num_heads
        out = out.view(-1, problems.num, self.num_heads, problems.size, width)
        return out.transpose(2, 3).flatten(3).flatten(1, 2)


_tried: dict[tuple[object, ...], str] = {}


def kernel_failure(attention: WindowAttention, dtype: torch.dtype) -> str:
    """Tries the window kernel on the module's GPU beside torch's attention, once for each shape: a model that is
    compiled has no way back later.

    Returns:
        What is wrong with it there, also if the module is to do without; empty if nothing is, it was not tried, or the
        module is on no GPU.
    """
    device = attention.qkv.weight.device
    if device.type != "cuda":
        return ""
    shape = (attention.window, attention.num_heads, attention.proj.in_features, dtype, device)
    if shape not in _tried and attention.window_kernel is not None:
        _tried[shape] = try_kernel(copy.deepcopy(attention).to(dtype), device)
    return _tried.get(shape, "")


def try_kernel(attention: WindowAttention, device: torch.device) -> str:
    """Why not to use the module's window kernel on a device, mixed or not; the module is changed."""
    kernel, window, dtype = attention.window_kernel, attention.window, attention.qkv.weight.dtype
    grid, generator = (window, 2 * window), torch.Generator(device).manual_seed(0)
    unmixed = by_window(grid, window, relative_position_index(window).to(device))
    groups = torch.randint(2, grid, generator=generator, device=device)
    shape = (2, 2 * window**2, attention.qkv.out_features)
    qkv = torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
    inputs = (qkv, attention.relative_position_bias_table)
    results: list[list[Tensor]] = []
    for by_members in (True, False):
        attention.window_kernel = kernel if by_members else None
        mixed = separated(unmixed, groups, grid, dtype, by_members)
        results.append([])
        try:
            for (problems,) in (mixed.problems, unmixed.problems):  # each is a kernel of its own
                out = attention.attend(qkv, problems)
                results[-1] += [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]
            torch.cuda.synchronize(device)
        except Exception as error:  # of Triton, its compiler or the driver, which share no base
            return f"the window kernel does not run on {torch.cuda.get_device_name(device)}: {str(error).strip()[:200]}"
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*results, strict=True)]
    if all(error < _MAX_ERROR for error in errors):  # not of the largest: beside a NaN that is what stands first
        return ""
    off = ", ".join(f"{error:.2g}" for error in errors)
    where = torch.cuda.get_device_name(device)
    return f"the window kernel is off by {off} on {where} (output and its gradients, mixed and not)"


def _fits(size: int, qkv: Tensor) -> bool:
    return size <= MAX_SIZES.get(qkv.itemsize, 0)


def position_bias(table: Tensor, pairs: Tensor, size: int) -> Tensor:
    """[1 or num, h, size, size] for pairs of positions as in `Problems`."""
    # Not `table[pairs]`: the gradient of that sorts on GPUs, and takes twenty times as long on CPUs. From fp32: the
    # gradient sums hundreds of pairs into an entry, one by one.
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    bias = wide.t().index_select(1, pairs.flatten()).to(table.dtype)
    return bias.view(table.shape[1], -1, size, size).transpose(0, 1)


torch.fx.wrap("position_bias")


def resize_table(table: Tensor, window: int) -> Tensor:
    """A relative-position table [(2w-1)^2, h] for windows of another side (bicubic)."""
    return resize_rel_pos_bias_table_simple(table, (window, window), ((2 * window - 1) ** 2, table.shape[1]))


def _append(x: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([x, codes.expand(*x.shape[:-1], codes.shape[-1])], dim=-1)
