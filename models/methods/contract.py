"""What a method is: how an encoder learns from images without labels.

To add one, write a file beside this one with a subclass of `Method`, and put `register_method` before it; a plugin of a
user's own does the same in a module that the recipe names under `plugins:`. The constructor's keyword arguments are the
keys of the recipe's `method:` section, with their types and defaults.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixmae.models.contract import TrainableEncoder
from mixmae.models.encoders.contract import Encoder


class Column(NamedTuple):
    """One column of a picture: a title, and normalised images [rows, 3, H, W]."""

    title: str
    images: Tensor


class Method(TrainableEncoder):
    """`method(images, *inputs) -> loss`, where `inputs = method.draw(len(images), generator)`.

    Args:
        encoder: what is pretrained; a checkpoint holds its weights under `encoder.`.
    """

    masks_invalid = False
    """Whether the last of `inputs` says which pixels hold something, bool [B, H, W]: only these are judged."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def mask_invalid_pixels(self) -> None:
        """From now on `forward` is given which pixels hold something, behind what `draw` gives.

        Raises:
            ValueError: a method that cannot leave pixels out.
        """
        raise ValueError(f"{type(self).__name__} judges all pixels")

    @classmethod
    def fitted(cls, settings: Mapping[str, Any], encoder: Encoder) -> dict[str, Any]:
        """The settings, with what is None chosen to fit the encoder: a run's recipe says what was chosen."""
        return dict(settings)

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Says how the images that it will see are normalised, channel by channel (`data.mean`, `data.std`)."""

    @abstractmethod
    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """All that is random about a micro-batch, on the CPU; moved to the device it is what `forward` takes.

        Nothing else may be random but drop path: a step is a function of its images and of these tensors.
        """

    def reconstruct(self, images: Tensor, *inputs: Tensor, rows: int = 4) -> list[Column]:
        """What the model makes of the first `rows` images, for pictures; a method without pixels has no columns."""
        return []
