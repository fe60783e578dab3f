import pytest
import timm.scheduler
import torch
from torch import nn

from mixmae.base.errors import UsageError
from mixmae.trainer.engine.schedule import Schedule, build_schedule
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
