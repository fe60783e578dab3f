"""Recipes that ship are found by name from anywhere; tests/test_recipes.py loads each."""

import subprocess
import sys
from pathlib import Path

import pytest

from mixmae.base.errors import UsageError
from mixmae.launch.commands import recipes
from mixmae.trainer.recipe.library import find_recipe, library
from mixmae.trainer.recipe.loading import load_recipe
from tests.helpers import ROOT


def test_the_library_holds_all_of_configs() -> None:
    files = {file.relative_to(ROOT / "configs").with_suffix("").as_posix() for file in ROOT.glob("configs/**/*.yaml")}
    assert set(library()) == files
    assert "pretrain/swin_huge" in files


@pytest.mark.parametrize("name", library())
def test_a_recipe_opens_with_its_command_and_says_what_it_is(name: str) -> None:
    recipe = library()[name]
    command = recipe.head[0]
    assert command.startswith(("make demo", f"mixmae launch {name} "))
    assert len(recipe.summary) > 20


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("pretrain/swin_huge")
    assert load_recipe(name, ["seed=3"]) == load_recipe(ROOT / "configs" / "pretrain" / "swin_huge.yaml", ["seed=3"])
    name.parent.mkdir()
    name.write_text("seed: 7\n")
    assert find_recipe(name) == name
    assert load_recipe(name).seed == 7


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("pretrain/swin_hug", "pretrain/swin_huge"),
        ("swin_huge", "pretrain/swin_huge"),
        ("configs/pretrain/swin_huge.yaml", "pretrain/swin_huge"),
        ("Pretrain/Demo", "pretrain/demo"),
        ("xyz", None),
        ("pretrain", None),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, nearest: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as raised:
        load_recipe(Path(given))
    message = str(raised.value)
    assert message.startswith(f"recipe {given} does not exist")
    assert message.endswith("'mixmae recipes' lists the library")
    if nearest is not None:
        assert f"did you mean {nearest!r}?" in message
    assert "\n" not in message


def test_the_list_and_a_recipe_to_copy(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(library())
    assert all(line.endswith(recipe.summary) for line, recipe in zip(lines, library().values(), strict=True))
    assert recipes.main(["show", "pretrain/demo"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "pretrain" / "demo.yaml").read_text()


@pytest.mark.distributed
def test_commands_take_names_from_any_directory(tmp_path: Path) -> None:
    for argv in (
        ["launch", "pretrain/swin_huge", "--local", "8", "--dry-run"],
        ["plan", "pretrain/swin_huge", "--gpu", "a100-80g", "--gpus", "64", "--json"],
    ):
        command = [sys.executable, "-m", "mixmae.launch.cli", *argv]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
