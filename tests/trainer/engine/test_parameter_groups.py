"""Which parameters share a learning-rate scale and a weight decay, in which order."""

import torch
from torch import nn

from mixmae.models import create_encoder
from mixmae.trainer.engine.parameter_groups import ParameterGroup, optimizer_groups, parameter_groups, set_lr


def test_weight_decay_spares_vectors_and_named_tables() -> None:
    encoder = create_encoder("mixmae_swin_nano")
    parameters = dict(encoder.named_parameters())
    decayed, exempt = parameter_groups(encoder, 0.05, ("relative_position_bias_table",))
    assert (decayed.weight_decay, exempt.weight_decay) == (0.05, 0.0)
    assert decayed.lr_scale == exempt.lr_scale == 1.0
    assert sorted(decayed.names + exempt.names) == sorted(parameters)
    assert all(name.endswith(("bias", "bias_table")) or "norm" in name for name in exempt.names)
    assert all(parameters[name].ndim > 1 for name in decayed.names)
    for group in (decayed, exempt):  # as in the module
        assert list(group.names) == [name for name in parameters if name in group.names]
    literal, _ = parameter_groups(encoder, 0.05)
    tables = [name for name in parameters if name.endswith("bias_table")]
    assert len(literal.names) == len(decayed.names) + len(tables)


def test_groups_are_ordered_by_scale_and_frozen_parameters_are_in_none() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].bias.requires_grad = False
    scales = {"0": 0.5, "1": 1.0, "2": 0.25}
    assert parameter_groups(model, 0.1, (), lambda name: scales[name[0]]) == [
        ParameterGroup(("2.weight",), 0.1, 0.25),
        ParameterGroup(("2.bias",), 0.0, 0.25),
        ParameterGroup(("0.weight",), 0.1, 0.5),
        ParameterGroup(("0.bias",), 0.0, 0.5),
        ParameterGroup(("1.weight",), 0.1, 1.0),
    ]
    without_decay = parameter_groups(model, 0.0)
    assert without_decay == [ParameterGroup(("0.weight", "0.bias", "1.weight", "2.weight", "2.bias"), 0.0)]


def test_each_group_has_the_schedules_rate_times_its_scale() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = parameter_groups(model, 0.0, (), lambda name: 0.1 if name[0] == "0" else 1.0)
    optimizer = torch.optim.AdamW(optimizer_groups(groups, dict(model.named_parameters())), lr=9.0)
    for lr in (0.3, 0.0, 1e-7):
        set_lr(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == [lr * 0.1, lr]
