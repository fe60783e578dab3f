import math

import pytest
import timm.models.swin_transformer as timm_swin
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import WindowAttention, separate, to_windows
from models.layers import PatchMerging
from models.mixing import draw_mix, upsample_groups


def dense_attention(attention: WindowAttention, x: Tensor, groups: Tensor) -> Tensor:
    """The same attention over the whole map at once, with every forbidden pair masked explicitly."""
    batch, height, width, dim = x.shape
    heads, w = attention.num_heads, attention.window
    q, k, v = attention.qkv(x.flatten(1, 2)).view(batch, -1, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    row, col = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    window = (row // w * width + col // w).flatten()
    member = upsample_groups(groups, (height, width)).expand(batch, height, width).flatten(1)
    allowed = (window[:, None] == window) & (member[:, :, None] == member[:, None, :])
    offset = [(a.flatten()[:, None] - a.flatten() + w - 1).clamp(0, 2 * w - 2) for a in (row % w, col % w)]
    bias = attention.relative_position_bias_table[offset[0] * (2 * w - 1) + offset[1]].permute(2, 0, 1)
    logits = q @ k.transpose(-2, -1) / math.sqrt(dim // heads) + bias
    weights = logits.masked_fill(~allowed[:, None], float("-inf")).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).reshape(batch, height, width, dim))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("window", [2, 4, 8])
def test_separated_windows_equal_dense_attention(window: int, per_sample: bool) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(32, 2, window).double()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(6, 8, 8, 32, dtype=torch.float64)
    groups = draw_mix(6, 3, (4, 4), torch.Generator().manual_seed(1), per_sample).groups
    out = attention(x, separate(groups, (8, 8), window, x.dtype))
    torch.testing.assert_close(out, dense_attention(attention, x, groups))


def test_unmixed_windows_equal_timm() -> None:
    torch.manual_seed(0)
    ours = WindowAttention(32, 2, 4)
    theirs = timm_swin.WindowAttention(32, num_heads=2, window_size=4)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 8, 8, 32)
    windows = to_windows(x, 4)
    expected = theirs(windows.flatten(0, 1)).view_as(windows)
    torch.testing.assert_close(to_windows(ours(x), 4), expected, atol=1e-5, rtol=1e-5)


def test_patch_merging_equals_timm() -> None:
    torch.manual_seed(0)
    ours, theirs = PatchMerging(8), timm_swin.PatchMerging(8)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("per_sample", [False, True])
def test_no_bias_is_made_for_each_sample(monkeypatch: pytest.MonkeyPatch, per_sample: bool) -> None:
    masks = []
    original = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
        masks.append(attn_mask)
        return original(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention = WindowAttention(32, 2, 4)
    groups = draw_mix(6, 3, (4, 4), torch.Generator(), per_sample).groups
    for separation in (None, separate(groups, (8, 8), 4, torch.float32)):
        attention(torch.randn(6, 8, 8, 32), separation)
    assert [mask.shape[0] for mask in masks] == [1, 1]
    assert max(mask.numel() for mask in masks) <= 4 * 2 * 16 * 16
