"""Memory that a checkpoint is copied to: on GPUs locked, to the byte."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mixmae.base.errors import UsageError
from mixmae.trainer.checkpoints import host_memory
from mixmae.trainer.checkpoints.host_memory import HostMemory

GPU = torch.device("cuda", 3)


class Cudart:
    """Stands for CUDA's runtime: keeps what is registered, and on which GPU that was asked for."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.registered: dict[int, int] = {}
        self.device: torch.device | None = None
        self.devices: list[torch.device | None] = []

    def cudaHostRegister(self, at: int, size: int, flags: int) -> int:  # noqa: N802
        self.registered[at] = size
        self.devices.append(self.device)
        return self.error

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    def cudaHostUnregister(self, at: int) -> int:  # noqa: N802
        del self.registered[at]
        return 0


def on_gpu(monkeypatch: pytest.MonkeyPatch, cudart: Cudart) -> None:
    monkeypatch.setattr(host_memory, "_gpu_of", lambda tensors: GPU)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", cudart.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))


def test_no_more_is_pinned_than_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's pinned memory is rounded up to a power of two: 4.3 GB for 2.7."""
    cudart = Cudart()
    on_gpu(monkeypatch, cudart)
    memory, tensors = HostMemory(), {"a": torch.arange(700.0), "b": torch.ones(5)}
    copies = memory.copy(tensors)
    assert all(torch.equal(copies[name], tensor) for name, tensor in tensors.items())
    assert list(cudart.registered.values()) == [4 * 705]
    memory.copy({"a": torch.ones(1000)})
    assert list(cudart.registered.values()) == [4000]
    del memory
    assert not cudart.registered
    assert cudart.devices == [GPU, GPU]  # a save's thread begins on GPU 0, where no other rank may make a context


def test_memory_that_may_not_be_locked_is_an_error_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, Cudart(error=2))
    with pytest.raises(UsageError, match=r"cannot pin .*CUDA error 2.*checkpoint.asynchronous=false"):
        HostMemory().reserve({"a": torch.ones(9)})


@pytest.mark.gpu
def test_copies_of_a_gpu_are_pinned() -> None:
    tensors = {"a": torch.arange(700.0, device="cuda")}
    copies = HostMemory().copy(tensors)
    assert copies["a"].is_pinned()
    assert torch.equal(copies["a"], tensors["a"].cpu())
