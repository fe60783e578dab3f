"""Paths in recipes are what a shell would make of them, once and for all when the recipe is read."""

from pathlib import Path

import pytest

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.loading import default_recipe


def test_homes_and_variables_stand_for_what_they_are_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    data = ["data.shards=$SCRATCH/shards", "data.cache.dir=${SCRATCH}/cache"]
    recipe = default_recipe(["run_dir=~/runs/x", "evaluate.shards=~/held-out", "evaluate.probe={shards: ~/p}", *data])
    assert (recipe.run_dir, recipe.data.cache.dir) == (Path("/home/me/runs/x"), Path("/scratch/me/cache"))
    assert (recipe.data.shards, recipe.evaluate.shards) == ("/scratch/me/shards", "/home/me/held-out")
    assert recipe.evaluate.probe is not None
    assert recipe.evaluate.probe.shards == "/home/me/p"
    assert default_recipe(["run_dir=a~b/~", "data.shards=./x"]).run_dir == Path("a~b/~")


@pytest.mark.parametrize("shards", ["s3://bucket/$x/~", "pipe:cat ~/$SHARD/{}"])
def test_urls_and_commands_stay_as_they_are(shards: str) -> None:
    assert default_recipe([f"data.shards={shards}"]).data.shards == shards


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run_dir=$NO_SUCH_VARIABLE/x", "the environment has no variable NO_SUCH_VARIABLE"),
        ("data.shards=${NO_SUCH_VARIABLE}", "the environment has no variable NO_SUCH_VARIABLE"),
        ("run_dir=~no-such-user/x", "~no-such-user is nobody's home"),
    ],
)
def test_what_stands_for_nothing_is_refused(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        default_recipe([override])
