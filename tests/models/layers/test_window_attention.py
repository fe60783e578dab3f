import math
from typing import Any

import pytest
import timm.models.swin_transformer as timm_swin
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixmae.models.layers.blocks import PatchMerging
from mixmae.models.layers.token_order import (
    Arrangement,
    by_group,
    by_window,
    relative_position_index,
    separated,
    to_windows,
    token_counts,
)
from mixmae.models.layers.window_attention import WindowAttention, position_bias
from mixmae.models.methods.mixing import draw_mix, upsample_groups
from mixmae.models.ops import sdpa

GRID = (8, 8)


def windows(window: int) -> Arrangement:
    return by_window(GRID, window, relative_position_index(window))


def attend(attention: WindowAttention, x: Tensor, arrangement: Arrangement) -> Tensor:
    """[B, H, W, C] -> [B, H, W, C]."""
    return arrangement.restore(attention(arrangement.sort(x), arrangement), GRID)


def dense_attention(attention: WindowAttention, x: Tensor, groups: Tensor, w: int) -> Tensor:
    """The same attention over the whole map at once, with every forbidden pair masked explicitly."""
    batch, height, width, dim = x.shape
    heads = attention.num_heads
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
    out = attend(attention, x, separated(windows(window), groups, GRID, x.dtype))
    torch.testing.assert_close(out, dense_attention(attention, x, groups, window))


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_attention_by_group_equals_dense_attention(k: int) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(32, 2, 8).double()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(6, 8, 8, 32, dtype=torch.float64, requires_grad=True)
    groups = draw_mix(6, k, (4, 4), torch.Generator().manual_seed(k)).groups
    arrangement = by_group(groups, k, GRID, relative_position_index(8))
    results = []
    for out in (attend(attention, x, arrangement), dense_attention(attention, x, groups, 8)):
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@given(k=st.integers(2, 5), cells=st.tuples(st.integers(2, 8), st.integers(3, 8)), per_cell=st.sampled_from([1, 2, 4]))
def test_problems_hold_the_tokens_of_one_group_each(k: int, cells: tuple[int, int], per_cell: int) -> None:
    grid = (cells[0] * per_cell, cells[1] * per_cell)
    groups = draw_mix(k, k, cells, torch.Generator().manual_seed(k)).groups
    pairs = torch.zeros((grid[0] * grid[1]) ** 2, dtype=torch.long)
    arrangement = by_group(groups, k, grid, pairs)
    members = arrangement.sort(upsample_groups(groups, grid)[None, :, :, None]).flatten()
    sizes = [size for count, size in token_counts(k, cells, grid) for _ in range(count)]
    assert [part.unique().tolist() for part in members.split(sizes)] == [[group] for group in range(k)]


@pytest.mark.parametrize("window", [2, 4, 8])
def test_the_grid_comes_back(window: int) -> None:
    x = torch.randn(2, 8, 8, 3, requires_grad=True)
    arrangement = windows(window)
    back = arrangement.restore(arrangement.sort(x), GRID)
    assert torch.equal(back, x)
    weights = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad((back * weights).sum(), x)[0], weights)


def test_unmixed_windows_equal_timm() -> None:
    torch.manual_seed(0)
    ours = WindowAttention(32, 2, 4)
    theirs = timm_swin.WindowAttention(32, num_heads=2, window_size=4)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 8, 8, 32)
    expected = theirs(to_windows(x, 4).flatten(0, 1)).view(2, 64, 32)
    arrangement = windows(4)
    torch.testing.assert_close(ours(arrangement.sort(x), arrangement), expected, atol=1e-5, rtol=1e-5)


def test_patch_merging_equals_timm() -> None:
    torch.manual_seed(0)
    ours, theirs = PatchMerging(8), timm_swin.PatchMerging(8)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("per_sample", [False, True])
def test_no_bias_is_made_for_each_sample(monkeypatch: pytest.MonkeyPatch, per_sample: bool) -> None:
    masks = []
    original = sdpa.attend

    def spy(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        masks.append(bias)
        return original(q, k, v, bias, scale)

    monkeypatch.setattr(sdpa, "attend", spy)
    attention = WindowAttention(32, 2, 4)
    groups = draw_mix(6, 3, (4, 4), torch.Generator(), per_sample).groups
    for arrangement in (windows(4), separated(windows(4), groups, GRID, torch.float32)):
        attend(attention, torch.randn(6, 8, 8, 32), arrangement)
    assert [mask.shape[0] for mask in masks] == [1, 1]
    assert max(mask.numel() for mask in masks) <= 4 * 2 * 16 * 16


class Selections(TorchDispatchMode):
    """Notes the dtypes in which rows are selected, and their gradients added up."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: dict[str, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.startswith("aten::index"):
            self.dtypes[func._schema.name] = args[0].dtype
        return func(*args, **(kwargs or {}))


def test_the_biases_gradient_is_summed_in_fp32() -> None:
    """Hundreds of pairs share an entry of the table. CPUs round their sum once, GPUs for each pair."""
    attention = WindowAttention(32, 1, 14).bfloat16()
    (problems,) = by_window((14, 14), 14, relative_position_index(14)).problems
    with Selections() as seen:
        position_bias(attention.relative_position_bias_table, problems.pairs, 14 * 14).float().sum().backward()
    assert set(seen.dtypes.values()) == {torch.float32}
    gradient = attention.relative_position_bias_table.grad
    assert gradient is not None
    pairs = torch.bincount(problems.pairs.flatten(), minlength=27 * 27).bfloat16()
    assert torch.equal(gradient[:, 0], pairs)
