"""The command as users type it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmae.base.errors import run_cli
from mixmae.trainer.planning.activation_memory import measure
from mixmae.trainer.planning.cli import main
from mixmae.trainer.planning.roofline import step_model
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe
from tests.helpers import tiny_recipe

DEMO = "configs/pretrain/demo.yaml"


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a recipe and more, which is called once for each model, whatever else its recipe says."""
    known: dict[tuple[str, ...], Any] = {}

    def remembered(recipe: Recipe, *more: object) -> Any:
        parts = (recipe.encoder, recipe.method, recipe.data)
        key = (recipe.task, recipe.train.precision, *(part.model_dump_json() for part in parts), *map(repr, more))
        if key not in known:
            known[key] = function(recipe, *more)
        return known[key]

    return remembered


measure_once, step_model_once = once(measure), once(step_model)


@pytest.fixture(autouse=True)
def each_model_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which is nearly all that a plan takes, and depends on no cluster."""
    monkeypatch.setattr("mixmae.trainer.planning.plan.measure", measure_once)
    monkeypatch.setattr("mixmae.trainer.planning.speed.step_model", step_model_once)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """Made so that the best found differs from it in all three keys."""
    file = tmp_path / "recipe.yaml"
    policy = {"kind": "torch", "stages": [1, 2]}
    changes = {"train.global_batch": 256, "train.micro_batch": 64, "train.activation_checkpointing": policy}
    content = tiny_recipe(**{"train.precision": "bf16", "train.zero_stage": 3, "train.duration": "9 epochs", **changes})
    file.write_text(content.to_yaml())
    return str(file)


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert run_cli(main, [*argv, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_text_fits_a_terminal(recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([recipe, "--gpus", "16", "--gpu", "a100-80g", "--link", "200gbps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "train." not in line) <= 80
    typed = next(line for line in lines if line.startswith("    train."))
    assert typed.split() == [
        "train.zero_stage=1",
        "train.micro_batch=16",
        "train.activation_checkpointing.kind=none",
    ]
    text = "\n".join(lines)
    for title in ("Memory of one GPU", "Activation checkpointing", "Time:", "Checkpoints and data", "Advice"):
        assert title in text
    assert "is not divisible by the recipe's train.micro_batch=64" in text


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        ({"task": "detect", "detection": {"num_classes": 3, "channels": 16, "rois": 8}}, "Mask R-CNN on {}, 3 classes"),
        ({"task": "segment", "segmentation": {"num_classes": 4, "width": 16}}, "UperNet of width 16 on {}, 4 classes"),
    ],
)
def test_the_head_names_the_encoder_and_what_stands_on_it(
    changes: dict[str, Any], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(tiny_recipe(**changes).to_yaml())
    assert main([str(tmp_path / "recipe.yaml"), "--gpus", "2", "--gpu", "a100-80g"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{model.format('mixmae_swin_nano')}, on 2 x a100-80g"


def test_advice_taken_is_the_best_found(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ["--gpus", "16", "--gpu", "a100-80g", "--link", "200gbps"]
    first = planned(capsys, recipe, *cluster)
    assert [key.partition("=")[0] for key in first["keys"]] == [
        "train.zero_stage",
        "train.micro_batch",
        "train.activation_checkpointing.kind",
    ]
    load_recipe(Path(recipe), first["keys"])
    second = planned(capsys, recipe, *cluster, *first["keys"])
    assert second["keys"] == []
    assert second["note"] is None
    assert second["recipe_run"] == second["chosen_run"] == first["chosen_run"]
    assert "is the best found" in second["advice"][0]


def test_figures_agree_with_each_other(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, recipe, "--gpus", "16", "--gpu", "h100", "--images", "100000", "--mfu", "0.1")
    run, cluster = plan["chosen_run"], plan["cluster"]
    assert plan["steps"] == round(9 * 100_000 / 256)
    assert run["images_per_second"] == pytest.approx(256 / run["step_seconds"])
    assert run["days"] == pytest.approx(plan["steps"] * run["step_seconds"] / 86400)
    assert plan["scaling"][-1] == run
    assert run["communication_seconds"] is None
    assert any("--link" in line for line in plan["advice"])
    assert plan["loading"]["images_per_second"] == pytest.approx(run["images_per_second"] / 2)
    for memory in (run["memory"], *(row["memory"] for row in plan["stages"])):
        assert memory["total"] == pytest.approx(sum(v for k, v in memory.items() if k not in ("total", "moment")))
    assert plan["speed"]["flops"] == pytest.approx(0.1 * 989e12)
    assert cluster["gpus"] == 16


def test_one_gpu_of_any_kind(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of several GPUs or nodes is said of one."""
    gpu = ["--gpus", "1", "--gpu-memory", "24", "--gpu-tflops", "120", "--price-per-gpu-hour", "0.5"]
    assert main([recipe, *gpu]) == 0
    text = capsys.readouterr().out
    for word in ("node", "each GPU", "all-reduce", "efficiency", "sending", "per GPU", "each rank", "--link"):
        assert word not in text, word
    assert "cost" in text
    plan = planned(capsys, recipe, *gpu)
    run = plan["chosen_run"]
    assert run["cost"] == pytest.approx(0.5 * 24 * run["days"])
    assert plan["speed"]["source"].startswith("modelled by a roofline")
    assert 0 < plan["speed"]["flops"] < 120e12


@pytest.mark.slow
def test_the_demo_recipe_reads_its_own_kind_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    """Overrides may stand before or behind the options."""
    plan = planned(capsys, DEMO, "--gpus", "2", "data.shards=nowhere", "--gpu", "l40s", "--image-bytes", "20KB")
    assert plan["recipe"]["data"]["shards"] == "nowhere"
    assert plan["data"]["mean_bytes"] == 20_000
    assert [run["gpus"] for run in plan["scaling"]] == [1, 2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "8", "--gpu", "a100-80gb"], "did you mean 'a100-80g'?"),
        (["--gpus", "12", "--gpu", "h100"], "--gpus 12 is not a whole number of nodes of 8"),
        (["--gpus", "16", "--gpu", "h100", "--link", "fast"], "--link fast: expected"),
        (["--gpus", "3", "--gpu", "h100"], "3 ranks cannot share data.streams=256"),
        (["--gpus", "256", "--gpu", "h100"], "fewer than the 2 that the method needs"),
        (["--gpus", "3", "--gpu", "h100", "data.streams=1"], "3 ranks cannot share"),
        (["--gpus", "8", "--gpu", "h100", "train.duration=1 sample"], "less than one step"),
        (["--gpus", "8", "--gpu", "h100", "train.micro_batsch=8"], "did you mean 'train.micro_batch'?"),
        (
            ["--gpus", "8", "--gpu", "a10", "--gpu-memory", "1.579", "--mfu", "0.3"],
            "nothing fits 8 x a10: the minimum is",
        ),
    ],
    ids=str,
)
def test_mistakes_are_explained(recipe: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(main, [recipe, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [["--mfu", "0"], ["--mfu", "40"], ["--gpus", "0"], ["--write-rate", "fast"], ["--image-bytes", "0"]],
    ids=str,
)
def test_options_out_of_range_are_refused(recipe: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([recipe, "--gpus", "8", "--gpu", "h100", *argv])
    assert ended.value.code == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.slow
def test_what_would_fit_is_said_and_does(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    large = "encoder.embed_dim=1536"
    assert run_cli(main, [recipe, "--gpus", "1", "--gpu", "a10", large]) == 2
    error = capsys.readouterr().err
    assert "nothing fits 1 x a10" in error
    gpus, gpu = error.split("--gpus ")[1].split()[0], error.split("--gpu ")[1].split()[0]
    assert planned(capsys, recipe, "--gpus", gpus, "--gpu", "a10", large)["keys"]
    assert planned(capsys, recipe, "--gpus", "1", "--gpu", gpu, large)["keys"]
