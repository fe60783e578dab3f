from typing import Any

import pytest
import timm.scheduler
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, MultiStepLR, PolynomialLR

from mixmae.base.errors import UsageError
from mixmae.trainer.engine.schedule import Schedule, build_schedule, cosine
from tests.helpers import tiny_recipe


def test_schedule_equals_timms_cosine() -> None:
    schedule = Schedule(peak_lr=0.3, min_lr=0.01, warmup_steps=10, total_steps=100, decay=cosine(10, 100))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=90, lr_min=0.01, warmup_t=10, warmup_lr_init=0.0, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(100):
        theirs.step_update(step)
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (lambda optimizer: PolynomialLR(optimizer, total_iters=100, power=0.9), {"optim.poly_power": 0.9}),
        (lambda optimizer: MultiStepLR(optimizer, [89, 96], gamma=0.2), {"optim.milestones": [0.889, 0.96]}),
    ],
    ids=["poly", "step"],
)
def test_schedule_equals_torchs(kind: Any, changes: dict[str, Any]) -> None:
    name = "step" if "optim.milestones" in changes else "poly"
    settings = {"optim.schedule": name, "train.duration": "100 steps", "optim.warmup": "10 steps", "optim.gamma": 0.2}
    schedule = build_schedule(tiny_recipe(**{**settings, "optim.base_lr": 0.3 * 256 / 8, **changes}), 1000)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    warmup = LinearLR(optimizer, start_factor=1e-12, total_iters=10)
    theirs = ChainedScheduler([warmup, kind(optimizer)])
    for step in range(100):
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_durations_become_steps() -> None:
    recipe = tiny_recipe(**{"train.duration": "10 epochs", "optim.warmup": "80 samples", "optim.base_lr": 1e-3})
    schedule = build_schedule(recipe, 100)
    assert (schedule.total_steps, schedule.warmup_steps) == (125, 10)
    assert schedule.peak_lr == pytest.approx(1e-3 * 8 / 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.schedule": "step"}, r"schedule=step with milestones=\[\]: set both"),
        ({"optim.milestones": [0.5]}, r"schedule=cosine with milestones=\[0.5\]: set both"),
        ({"optim.schedule": "step", "optim.milestones": [0.9, 0.9]}, "expected ascending shares of train.duration"),
    ],
)
def test_milestones_that_make_no_steps_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_recipe(**changes)


@pytest.mark.parametrize("changes", [{"optim.warmup": "8 steps"}, {"train.duration": "1 sample"}])
def test_impossible_schedules_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"train\.duration"):
        build_schedule(tiny_recipe(**changes), 100)
