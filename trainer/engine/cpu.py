"""bf16 on processors: what torch does slowly there, done otherwise with the same numbers to one rounding."""

from types import MethodType

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn


def apply_cpu_workarounds(model: nn.Module) -> None:
    """Changes how a bf16 model computes on this machine's processor, in place; parameters keep their names."""
    for module in model.modules():
        if isinstance(module, Attention):
            # The backward pass of torch's fused attention takes longer than the matrices that it saves.
            module.fused_attn = False
    if needs_upcast():
        upcast_matmuls(model)


def needs_upcast() -> bool:
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def upcast_matmuls(model: nn.Module) -> None:
    """Makes every linear layer and convolution of a bf16 model multiply in fp32.

    Without bf16 instructions torch multiplies bf16 matrices by a slow generic loop. Converting the operands to fp32,
    multiplying, and rounding the result gives the same numbers (bf16 products are exact in fp32) many times faster.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = MethodType(_linear, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Conv2d):
            module.forward = MethodType(_conv, module)  # type: ignore[method-assign]


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    bias = None if self.bias is None else self.bias.float()
    return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def _conv(self: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if self.bias is None else self.bias.float()
    return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)
