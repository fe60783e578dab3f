"""The optimizer that a task chose: its class, its groups, and at which ZeRO stages it runs."""

from typing import Any

import pytest
import torch
from torch import nn

from mixmae.base.errors import UsageError
from mixmae.trainer.engine.lars import LARS
from mixmae.trainer.engine.non_finite import Guarded
from mixmae.trainer.engine.optimizer import build_optimizer, lars
from tests.helpers import tiny_recipe
from tests.trainer.checkpoints.small import Small


class Exempting(Small):
    def no_weight_decay(self) -> set[str]:
        return {"body"}


def test_adamw_is_the_default_and_guarded_where_deepspeed_does_not_do_it() -> None:
    model = Exempting()
    changes: dict[str, Any] = {"optim.betas": [0.8, 0.9], "optim.clip_grad": 0.7}
    for stage in range(4):
        optimizer = build_optimizer(tiny_recipe(**changes, **{"train.zero_stage": stage}), model)
        assert isinstance(optimizer, torch.optim.AdamW)
        assert isinstance(optimizer, Guarded) == (stage == 0)
        assert [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [
            (0.05, 1),
            (0.0, 2),
        ]
        assert optimizer.defaults["betas"] == (0.8, 0.9)


def test_lars_is_refused_where_parameters_are_split() -> None:
    for stage in (1, 2, 3):
        with pytest.raises(UsageError, match=f"zero_stage={stage} splits parameters .* LARS .* set train.zero_stage=0"):
            build_optimizer(tiny_recipe(**{"train.zero_stage": stage}), Small(), lars())
    optimizer = build_optimizer(tiny_recipe(**{"train.zero_stage": 0}), Small(), lars(), lambda _: 0.5)
    assert isinstance(optimizer, LARS)
    assert isinstance(optimizer, Guarded)
    assert [group["lr_scale"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_lars_by_hand() -> None:
    """Two steps: a matrix with trust ratio and weight decay, a vector with neither, a matrix of zeros at ratio 1."""
    matrix, vector, zeros = (nn.Parameter(values) for values in (torch.ones(2, 2), torch.ones(2), torch.zeros(2, 2)))
    optimizer = LARS([matrix, vector, zeros], lr=0.5, weight_decay=0.1, momentum=0.9, trust=0.01)
    for parameter in (matrix, vector, zeros):
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    # |weights| = 2, |gradient + decay| = 2 * 3.1: the step is lr * trust * 2 in the gradient's direction
    assert torch.allclose(matrix, torch.full((2, 2), 1 - 0.5 * 0.01))
    assert torch.allclose(vector, torch.full((2,), 1 - 0.5 * 3.0))
    assert torch.allclose(zeros, torch.full((2, 2), -0.5 * 3.0))
    optimizer.step()
    assert torch.allclose(vector, torch.full((2,), -0.5 - 0.5 * (0.9 * 3.0 + 3.0)))
    assert torch.allclose(matrix, torch.full((2, 2), 0.995 - 0.5 * (0.9 * 0.01 + 0.00995)))
    zeros.grad = torch.zeros(2, 2)
    zeros.data.zero_()
    optimizer.state.clear()
    optimizer.step()
    assert torch.equal(zeros, torch.zeros(2, 2))
