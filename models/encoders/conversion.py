"""Published weights under our encoders' names: timm's, torchvision's, and those of the authors of Swin, SimMIM, MAE and
PVT, family by family.

Names that are ours already stay. What an encoder has no use for, such as decoders and class tokens, is left out; other
foreign names stay as they are, for whoever loads the weights to refuse.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

State = dict[str, Tensor]
_BUFFERS = r"relative_position_index|attn_mask"
_PRETRAINING = r"mask_token|decoder\..*|decoder_(?:embed|pos_embed|blocks|norm|pred)(?:\..*)?"
_NOT_OURS = re.compile(rf"(?:.*\.)?(?:{_BUFFERS})|{_PRETRAINING}|cls_token|dist_token|head_dist\..*|fc_norm\..*")
"""Indices that are computed, what predicts pixels, tokens that would see all groups, and the norm of their pooled
features."""


class Converted(NamedTuple):
    """Weights under an encoder's names, and the names in the source of those that it has no use for."""

    state: State
    left_out: tuple[str, ...]


def rename(state: State, own_name: Callable[[str], str]) -> Converted:
    """The weights under the names that `own_name` gives them, without those that no encoder has a use for."""
    left_out = tuple(name for name in state if _NOT_OURS.fullmatch(name))
    return Converted({own_name(name): value for name, value in state.items() if name not in left_out}, left_out)


def swin(state: State) -> Converted:
    """Of timm, of torchvision (version 1), and of the authors, whose patch merging closes a stage (SimMIM's, too)."""
    if "features.0.0.weight" in state:
        return rename(state, _torchvision_swin)
    closes = "layers.0.downsample.reduction.weight" in state
    return rename(state, lambda name: _timm_swin(name, merging_to=1 if closes else 0))


def _timm_swin(name: str, merging_to: int) -> str:
    name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"stages.{int(m[1]) + merging_to}.downsample", name)
    return _classifier(re.sub(r"^layers\.(\d)", r"stages.\1", name))


def _torchvision_swin(name: str) -> str:
    name = re.sub(r"^features\.0\.0\.", "patch_embed.proj.", name)
    name = re.sub(r"^features\.0\.2\.", "patch_embed.norm.", name)
    name = re.sub(r"^features\.([246])\.", lambda m: f"stages.{int(m[1]) // 2}.downsample.", name)
    name = re.sub(r"^features\.([1357])\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.", name)
    return _classifier(re.sub(r"\.mlp\.([03])\.", lambda m: f".mlp.fc{1 if m[1] == '0' else 2}.", name))


def vit(state: State, blocks_of_stage: int) -> Converted:
    """Of timm and of MAE's authors."""

    def own(name: str) -> str:
        name = re.sub(r"^pos_embed$", "pos_embed.weight", name)
        return _classifier(
            re.sub(r"^blocks\.(\d+)", lambda m: "stages.{}.blocks.{}".format(*divmod(int(m[1]), blocks_of_stage)), name)
        )

    tokens = sum(name in state for name in ("cls_token", "dist_token"))
    return rename(_without_prefix(state, "pos_embed", tokens), own)


def twins(state: State) -> Converted:
    """Of timm."""

    def own(name: str) -> str:
        name = re.sub(r"^pos_block\.(\d)\.proj\.0\.", r"stages.\1.pos_conv.", name)
        name = re.sub(r"^patch_embeds\.(\d)", r"stages.\1.patch_embed", name)
        return _classifier(re.sub(r"^blocks\.(\d)\.(\d+)", r"stages.\1.blocks.\2", name))

    return rename(state, own)


def pvt(state: State) -> Converted:
    """Of the authors (version 1)."""

    def own(name: str) -> str:
        name = re.sub(r"^pos_embed(\d)$", r"pos_embed\1.weight", name)
        name = re.sub(r"^block(\d)", r"blocks\1", name)
        stage = r"^(patch_embed|pos_embed|blocks)(\d)"
        return _classifier(re.sub(stage, lambda match: f"stages.{int(match[2]) - 1}.{match[1]}", name))

    return rename(_without_prefix(state, "pos_embed4", int("cls_token" in state)), own)


def resnet(state: State) -> Converted:
    """Of timm: but for a classifier that is a convolution there, all is the same."""
    flat = {name: value.flatten(1) if name == "head.fc.weight" else value for name, value in state.items()}
    return rename(flat, lambda name: name)


def _classifier(name: str) -> str:
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)


def _without_prefix(state: State, name: str, tokens: int) -> State:
    """Positions without those of tokens that stand before the patches of a square."""
    positions = state.get(name)
    if not tokens or positions is None or positions.dim() != 3 or _is_square(positions.shape[1]):
        return state
    return {**state, name: positions[:, tokens:]}


def _is_square(count: int) -> bool:
    return round(count**0.5) ** 2 == count
