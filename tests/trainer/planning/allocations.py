"""What torch's allocators really gave out: the oracle of planned bytes."""

import gc
import warnings
import weakref
from collections.abc import Callable

import torch

from mixmae.trainer.benchmarks import profiling


def peak_allocated(work: Callable[[], object]) -> int:
    """The most bytes of host memory that torch had allocated at once for what `work` made, by torch's profiler."""
    gc.collect()
    with torch.backends.mkldnn.flags(enabled=False):  # whose scratch memory depends on the processor's instructions
        return profiling.peak_allocated(profiling.profiled(work, torch.device("cpu")))


def storages() -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors that Python can reach, and of their gradients, by their address."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of objects that warn when they are looked at
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    found = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return {storage._cdata: storage for storage in found}


class Held:
    """Bytes of tensors that came since this was made."""

    def __init__(self) -> None:
        self._earlier = [weakref.ref(storage) for storage in storages().values()]

    def bytes(self) -> int:
        earlier = {storage._cdata for reference in self._earlier if (storage := reference()) is not None}
        return sum(storage.nbytes() for key, storage in storages().items() if key not in earlier)
