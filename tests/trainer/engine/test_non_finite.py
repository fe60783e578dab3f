"""Steps are clipped, and skipped where loss or gradient is not finite."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from mixmae.trainer.engine.lars import LARS
from mixmae.trainer.engine.non_finite import guarded, refuse_non_finite


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))


OPTIMIZERS: dict[type[torch.optim.Optimizer], dict[str, Any]] = {torch.optim.AdamW: {"fused": True}, LARS: {}}
kinds = pytest.mark.parametrize("kind", OPTIMIZERS)


@kinds
def test_a_guarded_optimizer_is_that_optimizer_with_clipping(
    model: nn.Module, kind: type[torch.optim.Optimizer]
) -> None:
    twin = copy.deepcopy(model)
    ours = guarded(kind)(model.parameters(), clip_grad=0.5, lr=0.1, **OPTIMIZERS[kind])
    plain = kind(twin.parameters(), lr=0.1, **OPTIMIZERS[kind])  # type: ignore[call-arg]
    assert (type(ours).__name__, isinstance(ours, kind)) == (f"Guarded{kind.__name__}", True)
    for step in range(5):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((model, ours), (twin, plain)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            if net is twin:
                norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
        assert ours._global_grad_norm == pytest.approx(norm.item())
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, expected)


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_guarded_optimizer_skips_what_is_not_finite(
    model: nn.Module, bad: float, kind: type[torch.optim.Optimizer]
) -> None:
    optimizer = guarded(kind)(model.parameters(), clip_grad=None, lr=0.1, **OPTIMIZERS[kind])
    before = copy.deepcopy(model.state_dict())
    (model(torch.ones(2, 4)).sum() * bad).backward()
    optimizer.step()
    assert optimizer.overflow
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert not optimizer.overflow
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("loss", "finite"), [(2.0, True), (math.inf, False), (math.nan, False)])
def test_a_non_finite_loss_has_a_non_finite_gradient(loss: float, finite: bool) -> None:
    weight = torch.zeros((), requires_grad=True)
    refuse_non_finite(weight * 3 + loss).backward()
    assert weight.grad is not None
    assert bool(weight.grad.isfinite()) == finite
    if finite:
        assert weight.grad == 3
