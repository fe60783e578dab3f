import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixmae.launch.backends.module_path import module_path, module_path_in_shell
from tests.helpers import ROOT

SHADOWS = ("code", "numpy", "profile", "queue", "random", "secrets", "token", "yaml")


def test_no_file_of_the_working_directory_takes_a_modules_place(tmp_path: Path) -> None:
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError")
    show = [sys.executable, "-m", "mixmae.launch.cli", "recipes", "show", "pretrain/demo"]
    done = subprocess.run(show, cwd=tmp_path, env={**os.environ, **module_path(os.environ)}, check=False)
    assert done.returncode == 0


def test_a_checkout_that_is_not_installed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert module_path({"PYTHONPATH": "/mine"}) == {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{ROOT}:/mine"}
    shell = ["bash", "-c", f'{module_path_in_shell()} bash -c "echo $PYTHONSAFEPATH \\$PYTHONSAFEPATH \\$PYTHONPATH"']
    said = subprocess.run(shell, env={"PYTHONPATH": "/mine", "PATH": "/bin"}, capture_output=True, check=True).stdout
    assert said.decode().split() == ["1", f"{ROOT}:/mine"]
    monkeypatch.chdir(tmp_path)
    assert module_path({"PYTHONPATH": "/mine"}) == {"PYTHONSAFEPATH": "1", "PYTHONPATH": "/mine"}
    assert module_path({}) == {"PYTHONSAFEPATH": "1"}
    assert module_path_in_shell() == "PYTHONSAFEPATH=1"
