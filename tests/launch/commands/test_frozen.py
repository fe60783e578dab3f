"""What a launch runs is what its recipe said when it was typed, whatever happens to the file afterwards."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixmae.base.errors import UsageError
from mixmae.base.ownership import hold_run
from mixmae.launch.backends import slurm_job_steps
from mixmae.launch.commands import launch
from mixmae.trainer.recipe.frozen import freeze, frozen_file
from mixmae.trainer.recipe.library import library
from mixmae.trainer.recipe.loading import load_recipe
from tests.helpers import ROOT, tiny_recipe
from tests.launch.fake_rank import SETTINGS

SBATCH = """#!/bin/sh
cat > job.sh
echo 42
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the working directory; its run directory and shards are relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    file = Path("recipe.yaml")
    file.write_text(tiny_recipe(**{"seed": 3, "run_dir": "run", "data.shards": "shards"}).to_yaml())
    return file


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps the script; returns where."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "job.sh"


@pytest.mark.parametrize("name", library())
def test_what_is_frozen_is_the_recipe(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(Path(name), [f"run_dir={tmp_path}", "optim.base_lr=1e-7"])
    frozen = freeze([recipe], [name, "--job-name", "a\nb: c\x07\u2028d"])
    frozen.write()
    assert load_recipe(frozen_file(tmp_path, frozen.launch)) == recipe


@pytest.mark.distributed
def test_restarts_read_the_recipe_of_the_launch(recipe: Path) -> None:
    """The ranks themselves change the file to nonsense before one of them is killed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment[SETTINGS] = json.dumps({"steps": 20, "at": 12, "rank": 1, "how": "kill", "edits": str(recipe)})
    command = ["-m", "tests.launch.launch_fake_ranks", str(recipe), "--local", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    assert "restarting from step 10" in done.stdout, done.stdout
    assert recipe.read_text() == "edited: after submission"
    assert len(re.findall(r"^rank 0 of 2 from step 10", done.stdout, re.MULTILINE)) >= 1
    starts = list(Path("run/logs").glob("*/rank-0000?.log"))
    assert len(starts) == 4
    assert all(log.read_text().startswith("seed 3\n") for log in starts)
    (frozen,) = Path("run/launches").iterdir()
    assert f"mixmae: the resolved recipe is {frozen}\n" in done.stdout


def test_a_queued_job_reads_the_recipe_of_its_submission(
    recipe: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [str(recipe), "--slurm", "--tasks-per-node", "2", "optim.base_lr=0.5"]
    assert launch.main(typed) == 0
    said = capsys.readouterr()
    assert said.out == "42\n"
    recipe.write_text("seed: 4\n")
    (frozen,) = Path("run/launches").iterdir()
    assert f"it reads {frozen} and writes run/logs/slurm-42.out" in said.err
    script = sbatch.read_text()
    assert str(recipe) not in script
    assert f"arguments=(\n    {frozen}\n)\n" in script
    read = load_recipe(frozen)
    assert (read.seed, read.optim.base_lr) == (3, 0.5)


def test_each_task_of_an_array_has_its_own(recipe: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = [str(recipe), "--slurm", "--tasks-per-node", "1", "--array", "2-3", "seed={task}", "run_dir=runs/{task}"]
    assert launch.main(typed) == 0
    recipe.unlink()
    first, second = sorted(Path("runs").glob("*/launches/*.yaml"))
    assert [load_recipe(file).seed for file in (first, second)] == [2, 3]
    assert f"it reads runs/%a/launches/{first.name} and" in capsys.readouterr().err
    assert f'arguments=(\n    runs/"$SLURM_ARRAY_TASK_ID"/launches/{first.name}\n)\n' in sbatch.read_text()


def test_launches_do_not_overwrite_each_others_recipes(recipe: Path, sbatch: Path) -> None:
    for seed in range(3):
        assert launch.main([str(recipe), "--slurm", "--tasks-per-node", "2", f"seed={seed}"]) == 0
    files = list(Path("run/launches").iterdir())
    assert sorted(load_recipe(file).seed for file in files) == [0, 1, 2]


@pytest.mark.parametrize("backend", [["--local", "2"], ["--slurm", "--tasks-per-node", "2"]])
def test_a_dry_run_shows_the_recipe_and_writes_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str], backend: list[str]
) -> None:
    assert launch.main([str(recipe), *backend, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert re.match(r"# run/launches/\S+\.yaml\n# mixmae launch recipe\.yaml ", said.err)
    Path("shown.yaml").write_text(said.err)
    assert load_recipe(Path("shown.yaml")) == load_recipe(recipe)
    assert not Path("run").exists()


def test_a_host_that_does_not_see_the_recipe_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not seen on .*; run_dir must be one directory on all hosts"):
        load_recipe(frozen_file(tmp_path, "20300101T000000Z"))


def test_a_run_directory_that_cannot_be_written_is_refused(recipe: Path) -> None:
    Path("run").touch()
    with pytest.raises(UsageError, match=r"run_dir=run: files cannot be written there \(.*\)"):
        launch.main([str(recipe), "--local", "2"])


def test_a_run_that_another_launch_has_is_not_started(recipe: Path) -> None:
    with hold_run(Path("run")), pytest.raises(UsageError, match=rf"run_dir=run is in use by process {os.getpid()} on"):
        launch.main([str(recipe), "--local", "2"])
    assert not Path("run/launches").exists()


def test_the_first_start_of_a_job_can_take_a_run_over(recipe: Path, sbatch: Path) -> None:
    for option in ([], ["--take-over"]):
        assert launch.main([str(recipe), "--slurm", "--tasks-per-node", "1", *option]) == 0
        assert ('--restarts "$restarts" --take-over\n' in sbatch.read_text()) == bool(option)
    step = ["--run-dir", "run", "--attempt", "a", "--launch", "job1", "--take-over"]
    Path("run/owner.json").touch()
    assert slurm_job_steps.main(["begin", *step, "--restarts", "1"]) == 0
    assert Path("run/owner.json").exists()
    assert slurm_job_steps.main(["begin", *step, "--restarts", "0"]) == 0
    assert not Path("run/owner.json").exists()


def test_the_task_of_an_array_needs_an_array(recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"{task} stands for the task of an --array, which is not given"):
        launch.main([str(recipe), "--slurm", "--tasks-per-node", "2", "run_dir=runs/{task}"])
