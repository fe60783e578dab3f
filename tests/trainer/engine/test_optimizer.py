import copy
import math

import pytest
import timm.scheduler
import torch
from torch import nn

from mixmae.base.errors import UsageError
from mixmae.models import create_encoder
from mixmae.trainer.engine.optimizer import GuardedAdamW, Schedule, build_schedule, parameter_groups, refuse_non_finite
from tests.helpers import tiny_recipe


def test_schedule_equals_timms_cosine() -> None:
    schedule = Schedule(peak_lr=0.3, min_lr=0.01, warmup_steps=10, total_steps=100)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=90, lr_min=0.01, warmup_t=10, warmup_lr_init=0.0, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(100):
        theirs.step_update(step)
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)


def test_durations_become_steps() -> None:
    recipe = tiny_recipe(**{"train.duration": "10 epochs", "optim.warmup": "80 samples", "optim.base_lr": 1e-3})
    schedule = build_schedule(recipe, 100)
    assert (schedule.total_steps, schedule.warmup_steps) == (125, 10)
    assert schedule.peak_lr == pytest.approx(1e-3 * 8 / 256)


@pytest.mark.parametrize("changes", [{"optim.warmup": "8 steps"}, {"train.duration": "1 sample"}])
def test_impossible_schedules_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"train\.duration"):
        build_schedule(tiny_recipe(**changes), 100)


def test_weight_decay_spares_vectors_and_named_tables() -> None:
    encoder = create_encoder("mixmae_swin_nano")
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    decayed, exempt = parameter_groups(encoder.named_parameters(), 0.05, ("relative_position_bias_table",))
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    exempt_names = {names[id(p)] for p in exempt["params"]}
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)
    assert all(n.endswith(("bias", "bias_table")) or "norm" in n for n in exempt_names)
    assert all(p.ndim > 1 for p in decayed["params"])
    literal, _ = parameter_groups(encoder.named_parameters(), 0.05, ())
    tables = [name for name in names.values() if name.endswith("bias_table")]
    assert len(literal["params"]) == len(decayed["params"]) + len(tables)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))


def test_guarded_adamw_is_adamw_with_clipping(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    guarded = GuardedAdamW(model.parameters(), clip_grad=0.5, lr=0.1, fused=True)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.1, fused=True)
    for step in range(5):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((model, guarded), (twin, plain)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            if net is twin:
                norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
        assert guarded._global_grad_norm == pytest.approx(norm.item())
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_guarded_adamw_skips_what_is_not_finite(model: nn.Module, bad: float) -> None:
    optimizer = GuardedAdamW(model.parameters(), clip_grad=None, lr=0.1, fused=True)
    before = copy.deepcopy(model.state_dict())
    (model(torch.ones(2, 4)).sum() * bad).backward()
    optimizer.step()
    assert optimizer.overflow
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert not optimizer.overflow


@pytest.mark.parametrize(("loss", "finite"), [(2.0, True), (math.inf, False), (math.nan, False)])
def test_a_non_finite_loss_has_a_non_finite_gradient(loss: float, finite: bool) -> None:
    weight = torch.zeros((), requires_grad=True)
    refuse_non_finite(weight * 3 + loss).backward()
    assert weight.grad is not None
    assert bool(weight.grad.isfinite()) == finite
    if finite:
        assert weight.grad == 3
