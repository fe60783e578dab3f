import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmae.base.errors import UsageError
from mixmae.trainer.benchmarks import claim, claim_runs
from mixmae.trainer.benchmarks.claim import COMPARED, STARTS
from mixmae.trainer.benchmarks.claim_page import PAGE, draw, percent, table, with_tables
from mixmae.trainer.benchmarks.results import RESULTS
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.registry import task_of
from tests.helpers import ROOT, idx_file


def photographs(folder: Path) -> Path:
    """Four classes of noise, the brighter the higher their number."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", 64), ("t10k", 24)):
        labels = np.arange(count, dtype=np.uint8) % 4
        images = random.integers(0, 60, (count, 28, 28), np.uint8) + 60 * labels[:, None, None]
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_file(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_file(labels))
    return folder


def test_what_is_given_wrongly_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no train-images.*apt-get install dataset-fashion-mnist, or .*--data"):
        claim.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(UsageError, match=r"unknown 'dino'; expected none, mixmae"):
        claim.main(["--starts", "dino"])
    with pytest.raises(UsageError, match=r"--seeds 0;1: expected comma-separated"):
        claim.main(["--seeds", "0;1"])


def test_methods_get_equal_time_and_no_run_is_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Recipe] = []

    def alone(function: Callable[..., Any], recipe: Recipe, *_: Any) -> Any:
        if function is claim_runs.step_seconds:
            return {"mixmae": 0.2, "mae": 0.1}[recipe.method.name]
        done.append(recipe)
        if len(done) == 6:
            raise KeyboardInterrupt
        return {"top1": 0.5, "probe_knn": 0.5, "probe_linear": 0.5, "processor_seconds": 10.0}

    monkeypatch.setattr(claim_runs, "alone", alone)
    argv = ["--data", str(photographs(tmp_path / "data")), "--out", str(tmp_path / "out"), "--seconds", "10"]
    argv += ["--starts", "none,mixmae,mae", "--seeds", "3"]
    with pytest.raises(KeyboardInterrupt):
        claim.main(argv)
    assert claim.main(argv) == 0
    assert len(done) == 3 + 4 + 4 + 1, "a probe and two fine-tunings each, what was interrupted once more"
    pretrained = {
        recipe.method.name: recipe for recipe in done if recipe.task == "pretrain" and not recipe.evaluate.probe
    }
    assert {name: str(recipe.train.duration) for name, recipe in pretrained.items()} == {
        "mixmae": "50 steps",
        "mae": "100 steps",
    }
    finetuned = [recipe for recipe in done if recipe.task == "finetune"]
    assert {recipe.encoder.init for recipe in finetuned} == {None, *(str(one.run_dir) for one in pretrained.values())}
    assert {recipe.seed for recipe in done} == {3}
    found = json.loads((tmp_path / "out" / "claim.json").read_text())
    assert {"cpu", "versions", "commit", "command"} <= found.keys()
    assert table(found, ["none", "mixmae"]).splitlines()[-1] == (
        "| MixMAE, K = 2 | 1 | 200 | 50 | 10 | 50.0 | 50.0 | 50.0 | 50.0 |"
    )
    with pytest.raises(UsageError, match=r"results of pretraining_seconds=10, and 20 is asked for"):
        claim.main([*argv, "--seconds", "20"])


@pytest.mark.parametrize("start", [name for name, start in STARTS.items() if start.recipe])
def test_every_start_is_a_recipe_of_the_same_encoder(start: str) -> None:
    recipe = load_recipe(Path(str(STARTS[start].recipe)), STARTS[start].overrides)
    assert recipe.encoder == load_recipe(Path("claim/finetune")).encoder
    task_of(recipe).build()


@pytest.mark.slow
def test_all_of_it_at_the_smallest_size(tmp_path: Path) -> None:
    argv = ["--data", str(photographs(tmp_path / "data")), "--out", str(tmp_path / "out"), "--seconds", "1"]
    claim.main([*argv, "--starts", "none,mixmae", "--seeds", "0", "--finetune-steps", "2", "--held-out", "20"])
    runs = json.loads((tmp_path / "out" / "claim.json").read_text())["runs"]
    assert [(run["start"], run["kind"]) for run in runs] == [
        *(("none", kind) for kind in ("probe", "finetune_1", "finetune_10")),
        *(("mixmae", kind) for kind in ("pretrain", "probe", "finetune_1", "finetune_10")),
    ]
    shares = [share for run in runs for name, share in run.items() if name in ("top1", "probe_knn", "probe_linear")]
    assert len(shares) == 8
    assert all(0 <= share <= 1 for share in shares)
    assert all(run["processor_seconds"] > 0 for run in runs if run["kind"] != "probe")


def test_the_page_shows_the_results() -> None:
    page, found = (ROOT / PAGE).read_text(), json.loads((ROOT / RESULTS / "claim.json").read_text())
    assert with_tables(page, found) == page, "run `make performance`"
    assert set(COMPARED) <= {run["start"] for run in found["runs"]}
    assert {"cpu", "versions", "commit", "command"} <= found.keys()


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(json.loads((ROOT / RESULTS / "claim.json").read_text()), tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 5000


def test_a_spread_is_that_of_samples() -> None:
    assert percent([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    assert percent([0.5]) == "50.0"
    assert percent([]) == ""
