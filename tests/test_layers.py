"""The layers hold: launch -> monitoring, mixmae.trainer.recipe.schema; trainer -> models, monitoring; these import none of ours."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("trainer", "models", "launch", "monitoring")
ALLOWED = {
    "models": ("models",),
    "monitoring": ("monitoring",),
    "trainer": ("trainer", "models", "monitoring"),
    "launch": (
        "launch",
        "monitoring",
        "mixmae.trainer.checkpoints.layout",
        "mixmae.trainer.recipe.schema",
        "mixmae.trainer.doctor.protocol.findings",
        "mixmae.trainer.doctor.protocol.folders",
        "mixmae.trainer.doctor.protocol.link",
        "mixmae.base.errors",
        "mixmae.base.exit_codes",
        "mixmae.base.heartbeat",
        "mixmae.base.rank_env",
        "mixmae.base.ports",
        "mixmae.trainer.recipe.loading",
        "mixmae.trainer.recipe.units",
    ),
}
WITHOUT_TORCH = [
    *ROOT.glob("launch/**/*.py"),
    ROOT / "trainer" / "checkpoints" / "layout.py",
    ROOT / "trainer" / "config.py",
    ROOT / "trainer" / "doctor" / "findings.py",
    ROOT / "trainer" / "doctor" / "folders.py",
    ROOT / "trainer" / "doctor" / "link.py",
    ROOT / "trainer" / "errors.py",
    ROOT / "trainer" / "exits.py",
    ROOT / "trainer" / "heartbeat.py",
    ROOT / "trainer" / "place.py",
    ROOT / "trainer" / "ports.py",
    ROOT / "trainer" / "recipes.py",
    ROOT / "trainer" / "signals.py",
    ROOT / "trainer" / "units.py",
    *ROOT.glob("monitoring/**/*.py"),
]


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", OURS)
def test_packages_import_only_downwards(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        for name in imports(file):
            if name.split(".")[0] in OURS:
                assert any(name == a or name.startswith(a + ".") for a in ALLOWED[package]), f"{file}: {name}"


@pytest.mark.parametrize("file", WITHOUT_TORCH, ids=lambda file: str(file.relative_to(ROOT)))
def test_login_nodes_need_no_torch(file: Path) -> None:
    heavy = {"torch", "deepspeed", "timm", "torchvision", "fairscale", "webdataset", "numpy"}
    assert not heavy & {name.split(".")[0] for name in imports(file)}


def test_models_use_torch_timm_and_triton_alone() -> None:
    used = {name.split(".")[0] for file in (ROOT / "models").rglob("*.py") for name in imports(file)}
    assert used - sys.stdlib_module_names <= {"torch", "timm", "triton", "models"}
