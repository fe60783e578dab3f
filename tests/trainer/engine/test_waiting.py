"""What a step waits for: of the device, only for what an optimizer has to know."""

from typing import Any

import pytest
import torch

from mixmae.models.methods.mixing import draw_mix
from mixmae.trainer.engine.deepspeed_engine import build_engine, deepspeed_config
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.non_finite import refuse_non_finite
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.registry import build_model
from tests.helpers import run_ranks, tiny_recipe

KINDS = [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


def recipe_for(stage: int, precision: str) -> Recipe:
    sizes = {"train.zero_stage": stage, "train.precision": precision, "train.global_batch": 4, "train.micro_batch": 4}
    return tiny_recipe(**sizes)


def waits(ranks: Ranks, stage: int, precision: str) -> int:
    """How often DeepSpeed waits for the device in some steps; on a GPU torch refuses any other waiting meanwhile."""
    from deepspeed.accelerator import get_accelerator

    engine = build_engine(build_model(recipe_for(stage, precision)), recipe_for(stage, precision), ranks)
    accelerator, counted = get_accelerator(), 0

    def synchronize(*given: Any) -> None:
        nonlocal counted
        counted += 1

    images = torch.randn(4, 3, 64, 64, device=ranks.device)
    mix = draw_mix(4, 2, engine.module.grid, torch.Generator().manual_seed(0)).to(ranks.device)
    on_gpu = ranks.device.type == "cuda"
    for step in range(6):
        if step == 3:
            accelerator.synchronize = synchronize
        if on_gpu and step >= 3:
            torch.cuda.set_sync_debug_mode("error")
        engine.backward(refuse_non_finite(engine(images, *mix)))
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        engine.step()
    return counted


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_steps_never_synchronise_the_device(stage: int, precision: str) -> None:
    """DeepSpeed's throughput timer, on by default, does so twice in each micro-step."""
    assert run_ranks(waits, 1, stage, precision) == [0]


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "precision"), KINDS[:3])
def test_neither_forward_nor_backward_waits_for_a_gpu(stage: int, precision: str) -> None:
    assert run_ranks(waits, 1, stage, precision) == [0]


def test_deepspeed_times_nothing() -> None:
    assert deepspeed_config(recipe_for(2, "bf16"), 1)["timers"] == {"throughput": {"enabled": False}}
