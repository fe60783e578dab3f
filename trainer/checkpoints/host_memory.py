"""Staging buffers in host memory for asynchronous checkpoints."""

import mmap
import weakref
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mixmae.base.errors import UsageError


class HostMemory:
    """A staging buffer for the tensors that a rank saves: reused by every save, pinned if they are on a GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._unpin: Callable[[], object] = lambda: None

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocates memory for copies of these tensors, so that `copy` allocates none; a no-op if the size is the same.

        Each page is touched, because the kernel commits memory on the first write only, which takes several times as
        long as the copy. numpy does that in one thread, and releases the GIL for the threads that train.
        """
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._memory.numel() != size:
            self._unpin()
            self._memory = torch.empty(size, dtype=torch.uint8)
            self._memory.numpy()[:: mmap.PAGESIZE] = 0
            if size and (device := _gpu_of(tensors)) is not None:
                self._unpin = weakref.finalize(self, _pin(self._memory, device))

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, valid until the next call; returns when they are complete."""
        self.reserve(tensors)
        copies = {}
        end = 0
        for name, tensor in tensors.items():
            start, end = end, end + tensor.nbytes
            copies[name] = self._memory[start:end].view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor, non_blocking=True)
        if (device := _gpu_of(tensors)) is not None:
            torch.cuda.current_stream(device).synchronize()
        return copies


def _pin(memory: Tensor, device: torch.device) -> Callable[[], object]:
    """Locks these pages, and no more: torch's own pinned memory is rounded up to a power of two.

    Args:
        device: that they are copied from. A thread begins with GPU 0, on which each rank of a host would otherwise take
            half a gigabyte for a context of its own.

    Returns:
        what undoes it.

    Raises:
        UsageError: the system does not let so much memory be locked.
    """
    cudart, size = torch.cuda.cudart(), memory.numel()
    with torch.cuda.device(device):
        error = int(cudart.cudaHostRegister(memory.data_ptr(), size, 0))
    if error:
        raise UsageError(
            f"cannot pin {size / 1e9:.1f} GB of host memory for checkpoints (CUDA error {error}); raise 'ulimit -l' "
            "or set checkpoint.asynchronous=false"
        )
    return partial(cudart.cudaHostUnregister, memory.data_ptr())


def _gpu_of(tensors: Mapping[str, Tensor]) -> torch.device | None:
    return next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
