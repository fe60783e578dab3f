"""What an encoder is, to methods and the trainer: a timm model that can keep mixed images apart.

To add one, write a file beside this one with a subclass of `Encoder`, and call `register_encoder` for each of its
sizes; a plugin of a user's own does the same in a module that the recipe names under `plugins:`. The constructor's
keyword arguments are the keys of the recipe's `encoder:` section, beside `name`, `img_size` and `init`.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn

from mixmae.models.encoders.conversion import Converted

_Given = TypeVar("_Given")


def require_size(images: Tensor, height: int, width: int) -> Tensor:
    """The images, if they have this size; a function of its own, which symbolic traces keep whole.

    Raises:
        ValueError: they have another.
    """
    if images.shape[2] != height or images.shape[3] != width:
        raise ValueError(
            f"images are {images.shape[2]}x{images.shape[3]} px and the encoder is for {height}x{width}; resize them, "
            "or call set_input_size"
        )
    return images


fx.wrap("require_size")


def unless_traced(given: _Given | None) -> _Given | None:
    """Groups, or an edit; None in symbolic traces (torch.fx, and TorchScript through it), which are of images alone."""
    return None if isinstance(given, fx.Proxy) else given


if TYPE_CHECKING:
    MapEdit = Callable[[int, Tensor], Tensor]
else:
    MapEdit = Any  # torch.fx copies annotations into the code that it writes, where TorchScript has to read them
"""`edit(stage, x)`: what a method makes of the map [B, H, W, C] at the beginning of a stage, counted from 1: behind its
patch embedding or merging, and before positions are added."""


class Encoder(nn.Module):
    """`encoder(images, groups=None, num_groups=None) -> features`, one object in pretraining and in fine-tuning.

    Beside what follows it is a timm model: `forward_features`, `forward_head`, `forward_intermediates`,
    `reset_classifier`, `get_classifier`. Built with `num_classes=0, global_pool=""`, `forward` gives the last stage's
    features as a map [B, Gh, Gw, num_features].
    """

    output_fmt = "NHWC"
    """timm's: the layout of `forward_features`; `forward_intermediates` and features_only give NCHW."""
    stride = 32
    """Pixels along a cell's side."""
    num_stages = 4
    first_conv = "patch_embed.proj"
    """timm's: the first convolution, which other numbers of channels change."""
    grid: tuple[int, int]
    """Cells (Gh, Gw) that are mixed: the token grid of the last stage."""
    num_features: int
    """Width of the last stage."""
    feature_info: list[dict[str, Any]]
    """timm's: `num_chs`, `reduction` and `module` of each stage's map."""
    position_size: tuple[int, int] | None = None
    """Pixels (height, width) of the images whose fixed positions are resized to the input's, by the constructor's
    argument `pretrain_img_size`; None where positions are learned, and resized with the weights."""
    edit_dims: Sequence[int] = ()
    """Widths of the maps that `edit` is given, stage by stage; none where `forward` takes no `edit`."""
    keep_map: Literal["sample", "micro_batch"] | None = None
    """Whether `forward_kept` is there: where attention is global throughout, each sample may keep cells of its own, and
    a class token may stand before them; else a micro-batch keeps the same ones."""

    @property
    def in_chans(self) -> int:
        """Channels of the images: 3, unless it was built for others."""
        weight = self.get_submodule(self.first_conv).weight
        assert isinstance(weight, Tensor)
        return weight.shape[1]

    @classmethod
    def fit_sizes(cls, sizes: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's arguments: a name's sizes, those given in their place, and what follows from these."""
        return {**sizes, **given}

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        groups: Tensor | None = None,
        num_groups: int | None = None,
        edit: MapEdit | None = None,
    ) -> Tensor:
        """Images [B, in_chans, H, W], normalised. A position's features depend on positions of its own group only.

        Args:
            groups: [Gh, Gw] or [B, Gh, Gw] when the images are mixed; None for unmixed ones.
            num_groups: K, for maps whose groups have the sizes that `mixing.group_sizes` says, as those of `draw_mix`;
                attention then works group by group. Without it a mask keeps the groups apart, whatever their sizes.
            edit: changes maps on their way; see `MapEdit` and `edit_dims`.
        """

    def forward_kept(self, images: Tensor, kept: Tensor, class_token: Tensor | None = None) -> Tensor:
        """Features of some cells as if there were no others, [B, n, num_features]; what is dropped costs nothing.

        Args:
            kept: int64 [B, n], or [1, n] for all samples (`keep_map`), cells counted row by row.
            class_token: [1, 1, C], which goes before the cells, and comes back there.
        """
        raise NotImplementedError(type(self).__name__)

    def forward_blocks(self, images: Tensor, count: int) -> list[Tensor]:
        """Features behind each of the last `count` blocks, pooled by their mean, [B, C]; the last ones behind the final
        norm."""
        raise NotImplementedError(type(self).__name__)

    @abstractmethod
    def stage_blocks(self, stage: int) -> Sequence[nn.Module]:
        """The blocks of a stage, counted from 1."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True, stages: Sequence[int] | None = None) -> None:
        """Recomputes the blocks of the named stages, counted from 1, in the backward pass; None for all."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """timm's layer groups, from the image to the head, for layer-wise learning-rate decay."""

    @abstractmethod
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Makes the model take images of another size, with the weights that it has: positions are resized, and
        position tables resized (bicubic).

        Raises:
            ValueError: the size does not divide into cells or windows.
        """

    def convert(self, state: dict[str, Tensor]) -> Converted:
        """Weights of another implementation of this architecture under this encoder's names; its own stay."""
        return Converted(dict(state), ())

    def fit_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the same encoder at another image or window size, resized to this one's, or those of another
        implementation (`convert`).

        Raises:
            ValueError: what is to be resized is not of a square image.
        """
        return self.convert(state).state

    def no_weight_decay(self) -> Collection[str]:
        """timm's: names of parameters that weight decay leaves alone, beside all 1-D ones."""
        return set()

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: the forward pass of unmixed images, with these weights."""
        graph = fx.Tracer().trace(self)
        for node in [node for node in graph.nodes if node.op == "placeholder" and not node.users][::-1]:
            graph.erase_node(node)
        return fx.GraphModule(self, graph, type(self).__name__).train(self.training)

    def set_fused_attention(self, dtype: torch.dtype = torch.bfloat16, windows: bool = True) -> list[str]:
        """Attention in kernels of this project's own, on GPUs, where problems are small enough; else nothing.

        Args:
            dtype: of queries, keys and values.
            windows: that of windows too, beside that of the global stages' groups.

        Returns:
            What is left to torch's attention, and why.
        """
        return []


def edit_of(edit: MapEdit | None, stage: int) -> Callable[[Tensor], Tensor]:
    """What happens to the map at the beginning of a stage."""
    return unchanged if edit is None else partial(edit, stage)


def unchanged(x: Tensor) -> Tensor:
    """No edit."""
    return x
