"""What MixMAE and the trainer ask of an encoder; each family implements it."""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class Encoder(nn.Module):
    """`encoder(images, groups=None, num_groups=None) -> features`, one object in pretraining and in fine-tuning."""

    grid: tuple[int, int]
    """Cells (Gh, Gw): the token grid of the last stage."""
    stride: int
    """Pixels along a cell's side."""
    num_features: int
    """Width of the last stage."""
    num_stages: int

    @abstractmethod
    def forward(self, images: Tensor, groups: Tensor | None = None, num_groups: int | None = None) -> Tensor:
        """Images [B, 3, H, W], normalised.

        Args:
            groups: [Gh, Gw] or [B, Gh, Gw] when the images are mixed.
            num_groups: K, for maps whose groups have the sizes that `mixing.group_sizes` says, as those of `draw_mix`;
                attention then works group by group. Without it a mask keeps the groups apart, whatever their sizes.
        """

    @abstractmethod
    def stage_blocks(self, stage: int) -> Sequence[nn.Module]:
        """The blocks of a stage, counted from 1."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True, stages: Sequence[int] = (1, 2, 3, 4)) -> None:
        """Recomputes the blocks of the named stages, counted from 1, in the backward pass."""

    @abstractmethod
    def set_fused_attention(self) -> None:
        """Attention in a kernel of this project's own, on GPUs, where problems are small enough for it."""
