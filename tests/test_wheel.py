"""The package as pip installs it where there is no checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.helpers import ROOT


def test_a_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "mixmae", copy / "mixmae", ignore=shutil.ignore_patterns("__pycache__"))  # links as files
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mixmae/")}
    expected = {file.relative_to(copy).as_posix() for file in (copy / "mixmae").rglob("*") if file.is_file()}
    assert packed == expected
    assert "mixmae/configs/pretrain/demo.yaml" in packed
