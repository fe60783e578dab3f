"""MixMAE computed as in published code: the reference for speed and equality.

The same parameters and arithmetic without any optimisation: each block partitions its map into windows and reverses it,
builds its mask for every sample and window from the group map, materialises the attention matrix, adds bias and mask,
and applies softmax.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from timm.layers import Attention
from torch import Tensor

from mixmae.models.contract import Trainable
from mixmae.models.encoders.swin import Swin
from mixmae.models.encoders.swin_stage import SwinStage
from mixmae.models.layers.token_order import relative_position_index, to_windows
from mixmae.models.layers.window_attention import WindowAttention
from mixmae.models.methods.mixing import upsample_groups
from mixmae.models.methods.mixmae import MixMAE

_MASKED = -10000.0
"""Added to the logits of pairs in different groups."""


def make_plain(model: Trainable) -> Trainable:
    """Makes a model compute as in published code, in place; its parameters are unchanged."""
    assert isinstance(model, MixMAE)
    assert isinstance(model.encoder, Swin)
    for stage in model.encoder.stages:
        assert isinstance(stage, SwinStage)
        stage.forward = MethodType(_stage, stage)  # type: ignore[method-assign]
        for block in stage.blocks:
            attention = block.attn
            assert isinstance(attention, WindowAttention)
            index = relative_position_index(stage.window).to(attention.relative_position_bias_table.device)
            attention.forward = MethodType(_attention, attention)  # type: ignore[method-assign]
            attention.register_buffer("relative_position_index", index, persistent=False)
    for block in model.decoder.blocks:
        attention = block.attn
        assert isinstance(attention, Attention)
        attention.fused_attn = False
    return model


def _stage(
    self: SwinStage, x: Tensor, groups: Tensor | None, num_groups: int | None, edit: Callable[[Tensor], Tensor]
) -> Tensor:
    x = edit(self.downsample(x))
    for block in self.blocks:
        x = block(x, groups, self.window)
    return x


def _attention(self: Any, x: Tensor, groups: Tensor | None, window: int) -> Tensor:
    """[B, H, W, C] -> [B, H, W, C]."""
    batch, height, width, dim = x.shape
    windows = to_windows(x, window).flatten(0, 1)
    count, tokens, _ = windows.shape
    q, k, v = self.qkv(windows).view(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (q * self.scale) @ k.transpose(-2, -1)
    bias = self.relative_position_bias_table[self.relative_position_index].view(tokens, tokens, -1).permute(2, 0, 1)
    logits = logits + bias
    if groups is not None:
        member = upsample_groups(groups, (height, width)).expand(batch, height, width)[..., None]
        member = to_windows(member, window).view(count, 1, tokens)
        mask = (member[..., None] != member[..., None, :]).to(logits.dtype) * _MASKED
        logits = logits + mask
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(count, tokens, dim)
    out = self.proj(out).view(batch, height // window, width // window, window, window, dim)
    return out.transpose(2, 3).reshape(batch, height, width, dim)
