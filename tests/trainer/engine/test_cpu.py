import copy

import torch
from torch import nn

from mixmae.trainer.engine.cpu import upcast_matmuls


def test_widened_products_equal_native_bf16_ones() -> None:
    torch.manual_seed(0)
    native = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), nn.Linear(16, 8)).bfloat16()
    widened = copy.deepcopy(native)
    upcast_matmuls(widened)
    x = torch.randn(2, 3, 16, 16).bfloat16()
    results = []
    for net in (native, widened):
        y = net(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in net.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-6)


def test_names_and_modules_stay() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    names = list(net.state_dict())
    upcast_matmuls(net)
    assert list(net.state_dict()) == names
