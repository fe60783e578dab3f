"""What a recipe leaves to the hardware, and what DeepSpeed is then told."""

from typing import Any

import pytest

from mixmae.trainer.engine.deepspeed_engine import deepspeed_config
from mixmae.trainer.recipe.hardware import Device, fit_hardware
from mixmae.trainer.recipe.loading import default_recipe
from mixmae.trainer.recipe.schema import Recipe

KEYS = ("zero_stage", "compile", "fused_attention", "overlap_comm")


def recipe_of(*overrides: str) -> Recipe:
    return default_recipe(overrides)


@pytest.mark.parametrize(
    ("device", "ranks", "overrides", "expected"),
    [
        ("cuda", 8, [], (2, True, True, True)),
        ("cuda", 1, [], (1, True, True, False)),
        ("cpu", 8, [], (1, False, False, False)),
        ("cuda", 8, ["train.zero_stage=3"], (3, False, True, True)),
        ("cuda", 8, ["train.zero_stage=1"], (1, True, True, False)),
        ("cuda", 8, ["train.activation_checkpointing.kind=fairscale"], (2, False, True, True)),
        ("cuda", 8, ["task=detect"], (2, False, True, True)),
        ("cuda", 8, ["train.precision=fp32"], (2, True, False, True)),
        ("cuda", 8, ["train.compile=false", "train.overlap_comm=false"], (2, False, True, False)),
        ("cpu", 8, ["train.compile=true", "train.zero_stage=2", "train.overlap_comm=true"], (2, True, False, True)),
    ],
)
def test_what_is_faster_is_the_default(
    device: Device, ranks: int, overrides: list[str], expected: tuple[object, ...]
) -> None:
    fitted = fit_hardware(recipe_of(*overrides), device, ranks)
    assert tuple(getattr(fitted.train, key) for key in KEYS) == expected
    assert fit_hardware(fitted, "cpu", 1) == fitted  # nothing is left to choose


def test_nothing_is_compiled_where_there_is_no_compiler() -> None:
    train = fit_hardware(recipe_of(), "cuda", 8, with_triton=False).train
    assert (train.zero_stage, train.compile, train.fused_attention) == (2, False, False)


def test_deepspeed_is_told() -> None:
    config: dict[str, Any] = deepspeed_config(recipe_of(), 8, "cuda")
    assert (config["zero_optimization"]["stage"], config["zero_optimization"]["overlap_comm"]) == (2, True)
    assert config["communication_data_type"] == "bf16"
    alone = deepspeed_config(recipe_of(), 1, "cuda")
    assert alone["zero_optimization"]["stage"] == 1
    assert alone["bf16"]["immediate_grad_update"] is True  # not parameter by parameter behind the backward pass
    wide = deepspeed_config(recipe_of("train.communication_dtype=fp32"), 8, "cuda")
    assert wide["communication_data_type"] == "fp32"
