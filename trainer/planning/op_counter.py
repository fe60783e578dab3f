"""Counts live bytes and FLOPs of a pass, operation by operation."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_TO_COPY = torch.ops.aten._to_copy.default

Workspaces = Mapping[Any, Callable[..., int]]
"""Operators to functions of their arguments that return the bytes of the kernel's workspace."""


class Tracker(TorchDispatchMode):
    """Tracks live storages of all operations from allocation to release, and counts FLOPs.

    On the meta device nothing is computed or allocated; bytes are those of a real device. torch's own MemTracker gives
    the same numbers, with a snapshot for every module and operation, thirty times slower.

    Args:
        known: existing tensors, which are not counted.
        workspaces: see `Workspaces`.
    """

    def __init__(self, known: Iterable[Tensor], workspaces: Workspaces) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._workspaces = workspaces
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._now = self._gradients_now = 0
        self.others: list[int] = []
        """Live bytes without parameters' gradients, after each operation and in each kernel that needs a workspace."""
        self.gradients: list[int] = []
        """Bytes of parameters' gradients at the same moments."""
        self.on_host = 0
        """Bytes copied to host memory."""
        self.flops = 0
        """FLOPs by torch's formulas for matrix products, convolutions and attention."""
        for tensor in known:
            self._add(tensor, 0)

    @property
    def now(self) -> int:
        """Live bytes, without parameters' gradients."""
        return self._now

    def watch_gradients(self, model: nn.Module) -> None:
        """Counts the gradients of a model's parameters separately once each is accumulated."""
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._is_gradient)

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size = self._sizes[key]
        self._sizes[key] = 0  # lives until the end of the pass
        self._now -= size
        self._gradients_now += size

    def _add(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._sizes[key] = storage.nbytes() if size is None else size
        self._now += self._sizes[key]
        self._alive[key] = weakref.ref(storage, lambda _: self._remove(key))

    def _remove(self, key: int) -> None:
        del self._alive[key]
        self._now -= self._sizes.pop(key)

    def _record(self, workspace: int = 0) -> None:
        self.others.append(self._now + workspace)
        self.gradients.append(self._gradients_now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _TO_COPY and torch.device(kwargs.get("device") or "meta").type == "cpu" and args[0].is_meta:
            # Offloaded to host memory (fairscale). The copy counts again once it is read back.
            self.on_host += args[0].untyped_storage().nbytes()
            return torch.empty_like(args[0])
        results = func(*args, **kwargs)
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor):
                self._add(result)
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=results)
        self._record(self._workspaces[func](*args, **kwargs) if func in self._workspaces else 0)
        return results
