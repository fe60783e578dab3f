"""The layers hold, room by room: each imports only what stands below it."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

# Who may import what: a room, or a package with all its rooms.
ALLOWED = {
    "mixmae.base": ("mixmae.base",),
    "mixmae.models": ("mixmae.models",),
    "mixmae.monitoring": ("mixmae.monitoring", "mixmae.base"),
    "mixmae.trainer": ("mixmae.trainer", "mixmae.models", "mixmae.monitoring", "mixmae.base"),
    "mixmae.launch": (
        "mixmae.launch",
        "mixmae.monitoring",
        "mixmae.base",
        "mixmae.trainer.recipe",
        "mixmae.trainer.doctor.protocol",
    ),
}
# What login nodes need.
WITHOUT_TORCH = (
    "mixmae.base",
    "mixmae.monitoring",
    "mixmae.launch",
    "mixmae.trainer.recipe",
    "mixmae.trainer.doctor.protocol",
)
HEAVY = {"torch", "deepspeed", "timm", "torchvision", "fairscale", "webdataset", "numpy"}


def files_of(room: str) -> list[Path]:
    place = ROOT / room.replace(".", "/")
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lies_in(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_downwards(package: str) -> None:
    files = files_of(package)
    assert files
    for file in files:
        for name in imports(file):
            if lies_in(name, "mixmae"):
                assert any(lies_in(name, room) for room in ALLOWED[package]), f"{file}: {name}"


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_login_nodes_need_no_torch(room: str) -> None:
    files = files_of(room)
    assert files
    for file in files:
        assert not HEAVY & {name.split(".")[0] for name in imports(file)}, file


def test_models_use_torch_timm_and_triton_alone_and_detectors_torchvision() -> None:
    for file in files_of("mixmae.models"):
        used = {name.split(".")[0] for name in imports(file)} - sys.stdlib_module_names
        heads = {"torchvision"} if file.parent.name == "mask_rcnn" else set()
        assert used <= {"torch", "timm", "triton", "mixmae", *heads}, file


@pytest.mark.parametrize("room", ["run", "engine", "checkpoints", "telemetry"])
def test_these_rooms_know_models_by_contract_alone(room: str) -> None:
    for file in files_of(f"mixmae.trainer.{room}"):
        named = re.findall(r"MixMAE|draw_mix|Swin", file.read_text())
        assert not named, f"{file}: {named}"


def test_no_file_of_the_trainer_lies_loose_but_the_entry_point() -> None:
    assert {file.name for file in (ROOT / "trainer").glob("*.py")} == {"__init__.py", "train.py"}
