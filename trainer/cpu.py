"""bf16 on processors without bf16 instructions.

There, torch multiplies bf16 matrices by a slow generic loop. Converting the operands to fp32, multiplying, and rounding
the result gives the same numbers (bf16 products are exact in fp32) many times faster.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def needs_widening(device: torch.device) -> bool:
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widen_products(model: nn.Module) -> None:
    """Makes every linear layer and convolution of a bf16 model multiply in fp32."""
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
