"""Mixed convolution, pooling and norm against their definitions, written down once more for each group."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mixmae.models.layers.mixed_cells import Mix
from mixmae.models.layers.mixed_conv import MixedConv2d, mixed_conv2d, mixed_max_pool2d
from mixmae.models.layers.mixed_norm import MixedGroupNormReLU
from mixmae.models.methods.mixing import upsample_groups
from tests.helpers import ROOT

FILE = ROOT / "tests" / "data" / "partialconv.safetensors"
K = 3
# side of the map, of a cell, kernel, stride; cells from 8 on are tiled, smaller ones gathered
CASES = [(16, 8, 3, 1), (16, 8, 3, 2), (32, 16, 7, 2), (16, 4, 3, 1), (16, 4, 3, 2), (8, 2, 3, 2), (4, 1, 3, 1)]


def partial_conv2d(x: Tensor, weight: Tensor, present: Tensor, stride: int, conv_groups: int = 1) -> Tensor:
    """x [B, C, H, W], present [B or 1, 1, H, W]."""
    kernel = weight.shape[-1]
    ones = torch.ones(1, 1, kernel, kernel, dtype=x.dtype)
    out = F.conv2d(x * present, weight, stride=stride, padding=kernel // 2, groups=conv_groups)
    count = F.conv2d(present, ones, stride=stride, padding=kernel // 2)
    return out * (kernel**2 / count.clamp(min=1)) * (count > 0)


def by_definition(x: Tensor, weight: Tensor, groups: Tensor, stride: int) -> Tensor:
    members = upsample_groups(groups, (x.shape[1], x.shape[2])).expand(*x.shape[:3])[:, None]
    out = torch.zeros(())
    for group in range(K):
        present = (members == group).to(x.dtype)
        result = partial_conv2d(
            x.permute(0, 3, 1, 2), weight, present, stride, weight.shape[0] if weight.shape[1] == 1 else 1
        )
        out = out + result * present[:, :, ::stride, ::stride]
    return out.permute(0, 2, 3, 1)


def draw_groups(per_sample: bool, side: int) -> Tensor:
    shape = (2, side, side) if per_sample else (side, side)
    return torch.randint(0, K, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["k3", "k3s2", "k7s2"])
def test_the_definition_is_that_of_partial_convolution(name: str) -> None:
    reference = load_file(FILE)
    with safe_open(FILE, "pt") as opened:
        _, stride, _ = json.loads(opened.metadata()["config"])[name]
    out = partial_conv2d(reference["x"], reference[f"{name}.weight"], reference["mask"], stride)
    if f"{name}.bias" in reference:
        out = (out + reference[f"{name}.bias"][:, None, None]) * reference[f"{name}.present"]
    torch.testing.assert_close(out, reference[f"{name}.out"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("side", "cell", "kernel", "stride"), CASES)
def test_mixed_convolution(side: int, cell: int, kernel: int, stride: int, per_sample: bool, depthwise: bool) -> None:
    torch.manual_seed(0)
    groups = draw_groups(per_sample, side // cell)
    x = torch.randn(2, side, side, 4, dtype=torch.float64, requires_grad=True)
    shape = (4, 1, kernel, kernel) if depthwise else (5, 4, kernel, kernel)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    results = []
    for out in (mixed_conv2d(x, weight, None, stride, Mix.of(groups)), by_definition(x, weight, groups, stride)):
        results.append((out, *torch.autograd.grad(out.sin().sum(), [x, weight])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_bias_is_added_once() -> None:
    conv = MixedConv2d(4, 4, 3)
    x, mix = torch.randn(2, 8, 8, 4), Mix.of(draw_groups(False, 4))
    torch.testing.assert_close(conv(x, mix) - conv.bias, mixed_conv2d(x, conv.weight, None, 1, mix))


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixed_max_pooling(per_sample: bool) -> None:
    torch.manual_seed(0)
    groups = draw_groups(per_sample, 4)
    x = torch.randn(2, 16, 16, 3)
    members = upsample_groups(groups, (16, 16)).expand(2, 16, 16)[..., None]
    expected = torch.zeros(())
    for group in range(K):
        seen = x.masked_fill(members != group, float("-inf")).permute(0, 3, 1, 2)
        pooled = F.max_pool2d(seen, 3, 2, 1).permute(0, 2, 3, 1)
        expected = torch.where(members[:, ::2, ::2] == group, pooled, expected)
    assert torch.equal(mixed_max_pool2d(x, 3, 2, Mix.of(groups)), expected)


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixed_norm(per_sample: bool) -> None:
    torch.manual_seed(0)
    groups = draw_groups(per_sample, 4)
    norm = MixedGroupNormReLU(3, 12)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (2 + torch.randn(2, 8, 8, 12)).requires_grad_()
    members = upsample_groups(groups, (8, 8)).expand(2, 8, 8)
    expected = torch.zeros_like(x)
    for sample in range(2):
        for group in members[sample].unique():
            own = members[sample] == group
            normed = F.group_norm(x[sample][own].t()[None], 3, norm.weight, norm.bias)[0].relu().t()
            expected = expected.index_put((torch.tensor(sample), *own.nonzero(as_tuple=True)), normed)
    results = []
    for out in (norm(x, Mix.of(groups)), expected):
        results.append((out, *torch.autograd.grad(out.sin().sum(), [x, *norm.parameters()])))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_unmixed_norm_is_that_of_torch() -> None:
    norm, x = MixedGroupNormReLU(3, 12), torch.randn(2, 8, 8, 12)
    expected = F.group_norm(x.permute(0, 3, 1, 2), 3, norm.weight, norm.bias).relu().permute(0, 2, 3, 1)
    torch.testing.assert_close(norm(x), expected)
    one_group = Mix.of(torch.zeros(4, 4, dtype=torch.long))
    torch.testing.assert_close(norm(x, one_group), expected, atol=1e-5, rtol=1e-5)
