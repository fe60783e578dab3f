import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mixmae.base.errors import UsageError
from mixmae.trainer.planning.devices import find_gpu
from mixmae.trainer.planning.roofline import step_model
from mixmae.trainer.planning.speed import ASSUMED_MFU, speed
from mixmae.trainer.recipe.loading import default_recipe
from mixmae.trainer.tasks.flops import model_flops
from tests.helpers import ROOT, tiny_recipe

RECIPE = tiny_recipe(**{"train.precision": "bf16", "train.zero_stage": 1})
A100 = find_gpu("a100-80g")
RESULT = {
    "device": "NVIDIA A100-SXM4-80GB",
    "model": "mixmae_swin_nano",
    "variant": "fused",
    "batch": 64,
    "images_per_second": 1000.0,
    "model_tflops": 78.0,
}


def results(folder: Path, *entries: dict[str, Any]) -> Path:
    for number, entry in enumerate(entries):
        (folder / f"step-{number}.json").write_text(json.dumps(entry))
    return folder


def test_a_given_mfu_comes_first(tmp_path: Path) -> None:
    found = speed(RECIPE, A100, 0.2, results(tmp_path, RESULT))
    assert (found.flops, found.source) == (0.2 * 312e12, "given with --mfu")


def test_the_best_measurement_of_this_model_on_this_gpu(tmp_path: Path) -> None:
    """Its operations per second count, whatever peak its MFU is told against."""
    folder = results(tmp_path, RESULT, {**RESULT, "model_tflops": 93.6, "variant": "plain"})
    found = speed(RECIPE, A100, None, folder)
    assert found.flops == 93.6e12
    assert found.mfu == pytest.approx(0.3)
    assert found.source == "measured: step-1.json, variant plain, batch 64"


def test_other_measurements_are_left_aside(tmp_path: Path) -> None:
    """Of other GPUs, models, precisions and sizes, and all other benchmarks of this project."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path, dirs_exist_ok=True)
    changes = {"device": "NVIDIA H200", "model": "mixmae_swin_huge", "precision": "fp32", "img_size": 224}
    found = speed(RECIPE, A100, None, results(tmp_path, *({**RESULT, name: other} for name, other in changes.items())))
    assert found.mfu == pytest.approx(step_model(RECIPE, A100, RECIPE.train.micro_batch).mfu, rel=0.1)
    assert found.source.startswith("modelled by a roofline, to 15%: no measurement of this model on this GPU")


def test_small_micro_batches_are_slower_by_what_each_pass_takes(tmp_path: Path) -> None:
    found = speed(RECIPE, A100, None, tmp_path, ranks=8)
    flops = model_flops(RECIPE)
    expected = step_model(RECIPE, A100, 64, ranks=8).seconds  # between the two that the line is drawn through
    assert found.seconds(64 * flops, 1) == pytest.approx(expected, rel=0.05)
    assert found.seconds(128 * flops, 8) > 4 * found.seconds(128 * flops, 1)  # of a model that computes next to nothing


def test_in_fp32_an_mfu_is_assumed(tmp_path: Path) -> None:
    found = speed(tiny_recipe(), A100, None, tmp_path)
    assert (found.mfu, found.flops) == (ASSUMED_MFU, ASSUMED_MFU * 19.5e12)
    assert found.source.startswith("assumed")


def test_a_list_of_measurements(tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text(json.dumps([{**RESULT, "device": "B200"}, RESULT]))
    assert speed(RECIPE, A100, None, tmp_path).source.startswith("measured: steps.json, ")


def test_a_broken_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(UsageError, match=r"steps.json is not JSON"):
        speed(RECIPE, A100, None, tmp_path)


@pytest.mark.parametrize("encoder", ["mixmae_swin_huge", "mixmae_swin_base_w14"])
def test_an_h200_plans_with_what_one_was_measured_to_do(encoder: str) -> None:
    recipe = default_recipe([f"encoder.name={encoder}"])
    found = speed(recipe, find_gpu("h200"), None, ROOT / "benchmarks" / "results")
    assert found.source.startswith(f"measured: step-nvidia-h200-{encoder}-bf16.json, variant compiled-triton")
    assert 0.15 < found.mfu < ASSUMED_MFU
