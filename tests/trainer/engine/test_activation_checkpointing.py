from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixmae.models.methods.mixing import draw_mix
from mixmae.trainer.engine.activation_checkpointing import checkpoint_activations
from mixmae.trainer.recipe.sections.train import ActivationCheckpointing
from mixmae.trainer.tasks.registry import build_model
from tests.helpers import tiny_recipe


def gradients(dtype: torch.dtype, **settings: Any) -> dict[str, Tensor]:
    model = build_model(tiny_recipe(**{"encoder.depths": [2, 1, 2, 1]})).to(dtype)
    checkpoint_activations(model, ActivationCheckpointing(**settings))
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mix = draw_mix(4, 2, (2, 2), torch.Generator().manual_seed(0))
    model(images, *mix).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"stages": (1, 2)}, {}], ids=str)
@pytest.mark.parametrize("kind", ["selective", "torch"])
def test_torch_gives_the_same_gradients(kind: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    expected, actual = gradients(dtype), gradients(dtype, kind=kind, **settings)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


@pytest.mark.parametrize("settings", [{"stages": (1, "decoder")}, {}, {"cpu_offload": True}], ids=str)
def test_fairscale_gives_the_same_gradients_to_rounding(settings: dict[str, Any]) -> None:
    """Not to the bit: its forward pass runs without gradients, for which torch takes another attention kernel."""
    exact = flat(gradients(torch.float32))
    assert (flat(gradients(torch.float32, kind="fairscale", **settings)) - exact).norm() < 1e-5 * exact.norm()
    rounding = (flat(gradients(torch.bfloat16)) - exact).norm()
    assert (flat(gradients(torch.bfloat16, kind="fairscale", **settings)) - exact).norm() < 1.2 * rounding


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.float().flatten() for _, value in sorted(values.items())])


def saved_bytes(**settings: Any) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    model = build_model(tiny_recipe(**{"encoder.depths": [2, 2, 2, 2]}))
    checkpoint_activations(model, ActivationCheckpointing(**settings))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images, mix = torch.randn(4, 3, 64, 64), draw_mix(4, 2, (2, 2), torch.Generator())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images, *mix)
    return sum(kept.values())


def test_recomputing_the_first_stages_saves_memory() -> None:
    everything = saved_bytes()
    assert saved_bytes(kind="torch", stages=(1, 2)) < 0.8 * everything


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
def test_selective_recomputes_no_product(drop_path_rate: float) -> None:
    """Nor another mask of drop path than was used; how little it keeps beside that is for the plan to say."""
    recipe = tiny_recipe(**{"encoder.depths": [2, 1, 2, 1], "encoder.drop_path_rate": drop_path_rate})
    images, mix = torch.randn(4, 3, 64, 64), draw_mix(4, 2, (2, 2), torch.Generator().manual_seed(0))
    operations, found = [], []
    for kind in ("none", "selective"):
        model = build_model(recipe).train()
        checkpoint_activations(model, ActivationCheckpointing(kind=kind))
        torch.manual_seed(0)
        with FlopCounterMode(display=False) as counter:
            model(images, *mix).backward()
        counts = counter.get_flop_counts()["Global"]
        operations.append({name: counts[name] for name in (torch.ops.aten.addmm, torch.ops.aten.mm)})
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert operations[0] == operations[1]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
