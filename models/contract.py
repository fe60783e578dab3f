"""What the trainer's engine, planner and benchmarks ask of the module that a run trains."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from mixmae.models.encoders.contract import Encoder


class Trainable(nn.Module):
    """`module(images, *inputs) -> loss`: a method around an encoder, or an encoder with a head and its loss."""

    min_batch = 1
    """The fewest images that a micro-batch needs."""

    @abstractmethod
    def forward(self, images: Tensor, *inputs: Tensor) -> Tensor:
        """The loss, an fp32 scalar, for normalised fp32 images [B, 3, H, W]."""

    @abstractmethod
    def block_groups(self) -> Mapping[str, Sequence[nn.Module]]:
        """The blocks that are compiled, and may be recomputed, by the names that recipes use, such as `1` to `4` for an
        encoder's stages and `decoder`."""

    @abstractmethod
    def set_grad_checkpointing(self, groups: Collection[str]) -> None:
        """Recomputes the blocks of these groups in the backward pass."""

    def compiled_parts(self) -> Sequence[nn.Module]:
        """What is compiled beside the blocks: modules without a graph break, of static shapes."""
        return []

    def set_fused_attention(self, dtype: torch.dtype = torch.bfloat16, windows: bool = True) -> list[str]:
        """Attention in kernels of this project's own, on GPUs; nothing where there is none for it.

        Args, Returns: see `Encoder.set_fused_attention`.
        """
        return []

    def no_weight_decay(self) -> Collection[str]:
        """Names of parameters that weight decay leaves alone, beside all 1-D ones."""
        return set()

    def frozen_models(self) -> Sequence[nn.Module]:
        """What it computes with and does not train, such as a teacher: no module of it, so that neither optimizer nor
        checkpoint nor export has it; in memory all the same."""
        return []

    def as_counted(self) -> Self:
        """The module whose operations published figures count; one that is made for counting may be changed."""
        return self


class TrainableEncoder(Trainable):
    """A module around an encoder, whose blocks, kernels and exemptions from weight decay are the encoder's."""

    encoder_path: ClassVar[str] = "encoder"
    """Where the encoder is; a checkpoint holds its weights under this name."""

    def _encoder(self) -> Encoder:
        encoder = self.get_submodule(self.encoder_path)
        assert isinstance(encoder, Encoder)
        return encoder

    def block_groups(self) -> Mapping[str, Sequence[nn.Module]]:
        encoder = self._encoder()
        return {str(stage): encoder.stage_blocks(stage) for stage in range(1, encoder.num_stages + 1)}

    def set_grad_checkpointing(self, groups: Collection[str]) -> None:
        self._encoder().set_grad_checkpointing(stages=[int(name) for name in groups if name.isdigit()])

    def set_fused_attention(self, dtype: torch.dtype = torch.bfloat16, windows: bool = True) -> list[str]:
        return self._encoder().set_fused_attention(dtype, windows)

    def no_weight_decay(self) -> Collection[str]:
        return {f"{self.encoder_path}.{name}" for name in self._encoder().no_weight_decay()}
