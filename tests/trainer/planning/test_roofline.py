"""The model of a step, held against the steps that were measured, and its parts against arithmetic."""

import json
from typing import Any

import pytest
import torch

from mixmae.trainer.benchmarks.recipe import recipe_of
from mixmae.trainer.planning.devices import find_gpu
from mixmae.trainer.planning.rates import rates
from mixmae.trainer.planning.roofline import ERROR, product_seconds, step_model
from tests.helpers import ROOT, tiny_recipe

FILES = sorted((ROOT / "benchmarks" / "results").glob("step-nvidia-h200-*.json"))
MEASURED = [found for file in FILES for found in json.loads(file.read_text())]
H200 = find_gpu("h200")


def name_of(found: dict[str, Any]) -> str:
    return f"{found['model']}-{found['batch']}-{found['variant']}"


def off(found: dict[str, Any]) -> float:
    """How far the model is from a measured step."""
    recipe = recipe_of(found["model"], found["batch"], [f"method.num_images={found['num_images']}"])
    step = step_model(recipe, H200, found["batch"], released=found["variant"] == "plain-autocast")
    assert step.mfu == pytest.approx(found["model_tflops"] * 1e12 * found["step_seconds"] / step.seconds / 989e12, 0.01)
    return step.seconds / found["step_seconds"] - 1


@pytest.mark.slow
@pytest.mark.parametrize("found", MEASURED, ids=name_of)
def test_steps_take_what_is_modelled(found: dict[str, Any]) -> None:
    assert abs(off(found)) < ERROR


def test_a_measured_step_takes_what_is_modelled() -> None:
    (found,) = [one for one in MEASURED if name_of(one) == "mixmae_swin_base_w14-256-compiled-triton"]
    assert abs(off(found)) < ERROR


def test_a_product_takes_its_operations_or_its_bytes() -> None:
    reached = rates(H200)
    full = 128 * 132  # rows of one full wave of tiles
    assert product_seconds(full, 256, 8192, 0.0, reached) == pytest.approx(2 * full * 256 * 8192 / reached.product)
    assert product_seconds(full, 256, 8192, 8e12, reached) == 8e12 / reached.memory
    # One tile more is a second wave, of which nearly all multiprocessors see nothing.
    longer = product_seconds(full + 1, 256, 64, 0.0, reached) / product_seconds(full, 256, 64, 0.0, reached)
    assert longer > 1.5


def test_a_gpu_that_nobody_knows_has_rates_by_its_data_sheet() -> None:
    known, unknown = rates(find_gpu("a100-80g")), rates(find_gpu("mine", memory=80, tflops=312))
    for rate in ("product", "memory", "flash", "efficient", "grouped"):
        assert getattr(unknown, rate) == pytest.approx(getattr(known, rate), rel=0.15), rate


def test_ranks_share_the_optimizers_work() -> None:
    recipe = tiny_recipe(**{"train.precision": "bf16"})
    one, eight = (step_model(recipe, H200, 8, ranks) for ranks in (1, 8))
    assert one.optimizer == pytest.approx(8 * eight.optimizer)
    assert one.kernels == eight.kernels
    assert torch.get_default_dtype() == torch.float32
