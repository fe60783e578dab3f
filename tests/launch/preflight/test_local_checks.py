from pathlib import Path

import pytest

from mixmae.base import machine
from mixmae.base.errors import UsageError
from mixmae.launch.preflight.local_checks import check_this_machine
from tests.helpers import tiny_recipe


def test_this_machine_is_looked_at_before_ranks_start(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(**{"run_dir": tmp_path / "run", "data.shards": str(shards), "data.num_workers": 1})
    check_this_machine(recipe, 2)
    assert recipe.run_dir.is_dir()
    (tmp_path / "file").write_text("")
    for changed, message in (
        ({"run_dir": tmp_path / "file"}, "run_dir=.*cannot be written"),
        ({"data": recipe.data.model_copy(update={"shards": str(tmp_path / "no")})}, "does not exist"),
        ({"data": recipe.data.model_copy(update={"num_workers": 1024, "prefetch_factor": 10**9})}, "--shm-size"),
    ):
        with pytest.raises(UsageError, match=message):
            check_this_machine(recipe.model_copy(update=changed), 2)
    (tmp_path / "gone").mkdir()
    with monkeypatch.context() as there:
        there.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(UsageError, match="the working directory was removed"):
            check_this_machine(recipe, 2)
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    with pytest.raises(UsageError, match="mount a tmpfs"):
        check_this_machine(recipe, 2)
