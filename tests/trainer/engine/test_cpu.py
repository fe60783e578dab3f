import copy
import itertools

import pytest
import torch
from torch import nn

from mixmae.trainer.engine import cpu
from mixmae.trainer.engine.cpu import apply_cpu_workarounds, faster_matmuls, matmuls_of, upcast_matmuls


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


@pytest.mark.parametrize(("slower", "choice"), [("native", "upcast"), ("upcast", "native")])
def test_the_faster_way_is_taken_where_there_are_two(monkeypatch: pytest.MonkeyPatch, slower: str, choice: str) -> None:
    monkeypatch.setattr(cpu, "supports_bf16", lambda: True)
    seconds = {"native": 1.0, "upcast": 2.0} if slower == "upcast" else {"native": 2.0, "upcast": 1.0}
    turns = itertools.chain.from_iterable((0.0, seconds["native"], 0.0, seconds["upcast"]) for _ in itertools.count())
    monkeypatch.setattr(cpu, "perf_counter", lambda: next(turns))
    assert faster_matmuls() == choice
    net = nn.Sequential(nn.Linear(4, 4))
    apply_cpu_workarounds(net)
    assert ("forward" in vars(net[0])) == (choice == "upcast")


def test_a_run_goes_on_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "supports_bf16", lambda: True)
    assert [matmuls_of(stored) for stored in ("native", "upcast", "")] == ["native", "upcast", "native"]
    monkeypatch.setattr(cpu, "supports_bf16", lambda: False)
    assert faster_matmuls() == "upcast"
    assert [matmuls_of(stored) for stored in ("native", "upcast", "")] == ["upcast", "upcast", "upcast"]
