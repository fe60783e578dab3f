"""Images from the host to the device, ahead of the step that needs them."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from mixmae.trainer.recipe.sections.data import Data
from mixmae.trainer.recipe.sections.pixels import RGB


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, where it is needed after all that was started before.

    From memory that is not pinned a copy of more than 64 KB may wait for that, and the host with it.
    """
    if device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()  # which refuses views of repeated elements
    return tensor.to(device, non_blocking=True)


class ToDevice:
    """uint8 [B, 3, H, W] on the host to normalised fp32 on the device, without blocking the host.

    Args:
        scale: what values are divided by before mean and deviation; images may have any channels and type.
    """

    def __init__(
        self, device: torch.device, mean: Sequence[float], std: Sequence[float], scale: float = RGB.scale
    ) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.mean = torch.tensor(mean, device=device)[:, None, None] * scale
        self.inverse_std = 1 / (torch.tensor(std, device=device)[:, None, None] * scale)

    @classmethod
    def of(cls, device: torch.device, data: Data) -> Self:
        return cls(device, data.mean, data.std, data.pixels.scale)

    def __call__(self, images: Tensor) -> Tensor:
        # A difference of uint8 and fp32 takes CPUs twenty times as long as making them alike first.
        return self._copy(images).float().sub_(self.mean).mul_(self.inverse_std)

    def _copy(self, images: Tensor) -> Tensor:
        """On a GPU beside its computing: the host is ahead, and the copy would wait behind the step before."""
        if self._copies is None:
            return images.to(self.device, non_blocking=True)
        with torch.cuda.stream(self._copies):
            copied = images.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copies)
        copied.record_stream(computing)
        return copied
