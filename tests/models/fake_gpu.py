"""A GPU that is not there: models on torch's fake CUDA device, and operations that GPUs do in no fixed order."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_REFUSED = {
    "aten::_adaptive_avg_pool2d_backward",
    "aten::adaptive_max_pool2d_backward",
    "aten::avg_pool3d_backward",
    "aten::bincount",
    "aten::grid_sampler_2d_backward",
    "aten::histc",
    "aten::max_unpool2d",
    "aten::median",
    "aten::nll_loss2d_forward",
    "aten::put_",
    "aten::reflection_pad2d_backward",
    "aten::scatter_reduce",
    "aten::upsample_bicubic2d_backward",
    "torchvision::_roi_align_backward",
}
"""By `torch.use_deterministic_algorithms`, on GPUs, in its documentation; bilinear `interpolate` has a gradient of its
own there."""


class NoFixedOrder(TorchDispatchMode):
    """Notes the operations for which `train.deterministic=true` would end a run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _REFUSED and not _is_fine(name, args, kwargs or {}):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def _is_fine(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Refused is counting with weights, and a loss that adds pixels up itself."""
    if name == "aten::bincount":
        return len(args) < 2 and kwargs.get("weights") is None
    return name == "aten::nll_loss2d_forward" and args[3] == 0


def move(module: nn.Module, like: Callable[[Tensor], Tensor]) -> None:
    """Replaces all parameters and buffers."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(like(parameter))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = like(buffer)


def on_gpu(tensor: Tensor) -> Tensor:
    """As a bf16 model has it."""
    dtype = torch.bfloat16 if isinstance(tensor, nn.Parameter) else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="cuda")
