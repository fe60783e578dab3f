"""What an optimizer keeps with each parameter is known before its first step, and refused where it cannot be saved."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mixmae.base.errors import UsageError
from mixmae.trainer.checkpoints.slices import ModelSlices
from mixmae.trainer.engine.lars import LARS


def engine_with(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
    """As DeepSpeed's at ZeRO stage 0, as far as slices are concerned."""
    return SimpleNamespace(optimizer=optimizer, module=model, zero_optimization_stage=lambda: 0)


@pytest.mark.parametrize(
    ("kind", "settings", "states", "scalars"),
    [
        (torch.optim.AdamW, {"amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}, {"step"}),
        (torch.optim.NAdam, {}, {"exp_avg", "exp_avg_sq"}, {"step", "mu_product"}),
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer"}, set()),
        (torch.optim.SGD, {}, set(), set()),
        (LARS, {}, {"momentum_buffer"}, set()),
    ],
)
def test_states_by_the_optimizers_names(
    kind: type[torch.optim.Optimizer], settings: dict[str, Any], states: set[str], scalars: set[str]
) -> None:
    model = nn.Linear(3, 2)
    model.temperature = nn.Parameter(torch.tensor(1.0))
    optimizer = kind(model.parameters(), lr=0.1, **settings)  # type: ignore[call-arg]
    before = ModelSlices(engine_with(optimizer, model))
    assert before._states.keys() == states
    assert (before.optimizer_states, before.optimizer_scalars) == ([], {})
    assert not optimizer.state
    (model(torch.ones(4, 3)).sum() * model.temperature).backward()
    optimizer.step()
    after = ModelSlices(engine_with(optimizer, model))
    assert set(after.optimizer_states) == states
    assert after.optimizer_scalars.keys() == scalars


def test_states_of_another_shape_are_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(UsageError, match="row_var of Adafactor is neither: choose another optimizer"):
        _ = ModelSlices(engine_with(optimizer, model)).optimizer_states
