"""What encoders of four stages share: features, classifier, checkpointing, timm's contract.

Maps are [B, H, W, C] everywhere, so that a map is a row of tokens without a copy.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, to_2tuple
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixmae.models.encoders import contract
from mixmae.models.encoders.contract import Encoder, MapEdit, edit_of, unless_traced
from mixmae.models.layers.positions import LearnedPositions

NUM_STAGES = 4


def require_format(output_fmt: str) -> None:
    """Raises ValueError unless maps can be given so."""
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f"output_fmt={output_fmt!r}: expected NCHW or NHWC")


class Stage(nn.Module):
    """Blocks of one width; `forward(x, groups, num_groups, edit)` takes a map to the next."""

    blocks: nn.ModuleList
    grad_checkpointing = False
    outputs: list[Tensor] | None = None
    """Where blocks' outputs go while somebody asks for them."""

    def set_cells(self, cells: tuple[int, int]) -> None:
        """Another cell grid, of images of another size."""

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:
        """A block's output, which is recomputed in the backward pass where that is asked for."""
        out: Tensor
        if self.grad_checkpointing and torch.is_grad_enabled():
            out = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.training)
        else:
            out = block(*inputs)
        if self.outputs is not None:
            self.outputs.append(out)
        return out


class StagedEncoder(Encoder):
    """An encoder of four stages, a final norm and a classifier; families add these, in the order of their draws.

    Args:
        img_size: pixels, one side or (height, width).
        stride: pixels along a cell's side.
        dims: width of each stage.
        reductions: pixels along a token's side in each stage.

    Raises:
        ValueError: the image does not divide into cells.
    """

    stages: nn.ModuleList
    norm: nn.Module

    def __init__(
        self,
        img_size: int | tuple[int, int],
        stride: int,
        dims: Sequence[int],
        reductions: Sequence[int],
    ) -> None:
        super().__init__()
        self.stride = stride
        self._set_size(img_size)
        self.num_features = self.head_hidden_size = dims[-1]
        self.edit_dims = tuple(dims)
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]

    def add_head(self, num_classes: int, global_pool: str, drop_rate: float) -> None:
        self.num_classes = num_classes
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, input_fmt="NHWC")

    def _set_size(self, img_size: int | tuple[int, int]) -> None:
        height, width = to_2tuple(img_size)
        if height % self.stride or width % self.stride:
            raise ValueError(f"img_size {height}x{width} does not divide into cells of {self.stride} px")
        self.img_size = (height, width)
        self.grid = (height // self.stride, width // self.stride)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Another size of images; learned positions are resized (bicubic).

        Raises:
            ValueError: the image does not divide into cells.
        """
        self._set_size(img_size)
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.set_cells(self.grid)

    def forward(
        self,
        images: Tensor,
        groups: Tensor | None = None,
        num_groups: int | None = None,
        edit: MapEdit | None = None,
    ) -> Tensor:
        """Images [B, 3, H, W], normalised; groups [Gh, Gw] or [B, Gh, Gw], or None for unmixed images."""
        groups, edit = unless_traced(groups), unless_traced(edit)
        return self.forward_head(self.forward_features(images, groups, num_groups, edit))

    def forward_features(
        self,
        images: Tensor,
        groups: Tensor | None = None,
        num_groups: int | None = None,
        edit: MapEdit | None = None,
    ) -> Tensor:
        """The final norm's map, [B, H/stride, W/stride, C] of the last stage."""
        x = self._embed(images, groups, edit)
        for number, stage in enumerate(self.stages, start=1):
            x = stage(x, groups, num_groups, edit_of(edit, number))
        return self._normalise(x, groups)

    def _embed(self, images: Tensor, groups: Tensor | None = None, edit: MapEdit | None = None) -> Tensor:
        """The map that the first stage takes; edited where that stage does not begin with an embedding of its own."""
        return contract.require_size(images, *self.img_size).permute(0, 2, 3, 1)

    def _normalise(self, x: Tensor, groups: Tensor | None = None) -> Tensor:
        """The last stage's map behind the final norm."""
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's feature-extraction contract: the maps behind the stages `indices`."""
        require_format(output_fmt)
        take, last = feature_take_indices(NUM_STAGES, indices)
        maps = []
        x = self._embed(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                out = self._normalise(x) if norm and i == NUM_STAGES - 1 else x
                maps.append(out.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else out)
        if intermediates_only:
            return maps
        return x if stop_early and last < NUM_STAGES - 1 else self._normalise(x), maps

    def forward_blocks(self, images: Tensor, count: int) -> list[Tensor]:
        outputs: list[Tensor] = []
        kept = [stage for stage in self.stages if isinstance(stage, Stage)]
        for stage in kept:
            stage.outputs = outputs
        try:
            features = self.forward_features(images)
        finally:
            for stage in kept:
                stage.outputs = None
        # Tokens may be sorted, which their mean does not depend on.
        inner = [out.flatten(1, -2).mean(1) for out in outputs[len(outputs) - count : -1]]
        return [*inner, features.flatten(1, -2).mean(1)]

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: keeps what the maps behind the stages `indices` need, and returns their numbers."""
        take, last = feature_take_indices(NUM_STAGES, indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def set_grad_checkpointing(self, enable: bool = True, stages: Sequence[int] | None = None) -> None:
        for number, stage in enumerate(self.stages, start=1):
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable and (stages is None or number in stages)

    def stage_blocks(self, stage: int) -> Sequence[nn.Module]:
        chosen = self.stages[stage - 1]
        assert isinstance(chosen, Stage)
        return list(chosen.blocks)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """timm's layer groups, from the image to the head, for layer-wise learning-rate decay."""
        fine = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)", (0,)),  # what comes before a stage's blocks is of its first block's group
            (r"^norm", (99999,)),
        ]
        stem = r"^stem|^patch_embed|^pos_embed|^stages\.0\.(?:patch_embed|pos_embed)"
        return {"stem": stem, "blocks": r"^stages\.(\d+)" if coarse else fine}

    def fit_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = super().fit_state_dict(state)
        for name, module in self.named_modules():
            if isinstance(module, LearnedPositions) and f"{name}.weight" in state:
                state[f"{name}.weight"] = module.fit(state[f"{name}.weight"])
        return state

    def no_weight_decay(self) -> Collection[str]:
        """Learned positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed.weight")}

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
