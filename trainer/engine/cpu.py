"""bf16 on processors: what torch does slowly there, done otherwise with the same numbers to one rounding."""

import copy
import math
from time import perf_counter
from types import MethodType
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

Bf16Matmuls = Literal["native", "upcast"]
"""How a bf16 model multiplies: by the processor's bf16 instructions, or in fp32 with operands that are converted."""
_TOKENS, _WIDTH = 256, 768
"""Of the products that are timed: a millisecond or some each, so that most run between two looks of the scheduler."""
_TRIES = 10


def apply_cpu_workarounds(model: nn.Module, matmuls: Bf16Matmuls | None = None) -> None:
    """Changes how a bf16 model computes on this machine's processor, in place; parameters keep their names.

    Args:
        matmuls: None for what is faster here.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            # The backward pass of torch's fused attention takes longer than the matrices that it saves.
            module.fused_attn = False
    if (matmuls or faster_matmuls()) == "upcast":
        upcast_matmuls(model)


def supports_bf16() -> bool:
    """Whether the processor has instructions for products of bf16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def matmuls_of(stored: str) -> Bf16Matmuls:
    """How a run that goes on multiplies: as before, for the two ways round differently.

    Args:
        stored: with the run; empty in runs of versions that used the instructions wherever there are some.
    """
    return "native" if supports_bf16() and stored != "upcast" else "upcast"


def faster_matmuls() -> Bf16Matmuls:
    """Times both ways on this machine: instructions for bf16 need not be faster, as AVX-512's are without AMX."""
    if not supports_bf16():
        return "upcast"
    native = nn.Linear(_WIDTH, _WIDTH, dtype=torch.bfloat16)
    upcast = copy.deepcopy(native)
    upcast_matmuls(upcast)
    x = torch.ones(_TOKENS, _WIDTH, dtype=torch.bfloat16)
    best = {"native": math.inf, "upcast": math.inf}
    with torch.no_grad():
        for _ in range(_TRIES):  # taking turns, so that what else the machine does slows down both
            for name, layer in (("native", native), ("upcast", upcast)):
                start = perf_counter()
                layer(x)
                best[name] = min(best[name], perf_counter() - start)
    return "native" if best["native"] <= best["upcast"] else "upcast"


def upcast_matmuls(model: nn.Module) -> None:
    """Makes every linear layer and convolution of a bf16 model multiply in fp32.

    Without bf16 instructions torch multiplies bf16 matrices by a slow generic loop, and with some of them more slowly
    than in fp32. Converting the operands to fp32, multiplying, and rounding the result gives the same numbers (bf16
    products are exact in fp32) many times faster.
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
