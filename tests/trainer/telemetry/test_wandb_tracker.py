"""Weights & Biases, offline: what its own files hold after real runs."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixmae.base.errors import UsageError
from mixmae.base.ports import free_port
from mixmae.trainer.engine.deepspeed_engine import deepspeed_config
from mixmae.trainer.telemetry.events import read_events
from mixmae.trainer.telemetry.wandb_tracker import check_wandb
from tests.helpers import tiny_recipe

_BLOCK, _HEADER = 32768, 7


@pytest.fixture
def recipe_file(shards: Path, tmp_path: Path) -> Path:
    changes = {"data.shards": str(shards), "run_dir": str(tmp_path / "run"), "checkpoint.every": "4 steps"}
    wandb = {"project": "photos", "group": "night", "entity": "lab"}
    recipe = tiny_recipe(**{**changes, "log.wandb": wandb, "monitoring.enabled": False})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    return tmp_path / "recipe.yaml"


def needs_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        reason = "needs the package wandb: pip install 'mixmae[wandb]'"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def train(recipe: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-m", "mixmae.trainer.train", str(recipe)]
    env = {**clean, "OMP_NUM_THREADS": "1", "HOME": str(recipe.parent), **environment}
    return subprocess.run(command, env=env, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def records(file: Path) -> Iterator[Any]:
    """What a .wandb file holds: protocol buffers of W&B's own in the log format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = file.read_bytes(), _HEADER, b""  # the file has a header of its own
    while place + _HEADER <= len(content):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + _HEADER : place + _HEADER + size]
        place += _HEADER + size
        if kind in (1, 4):  # the whole of a record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(found: list[Any]) -> dict[str, dict[int, float]]:
    """Values by curve and step."""
    curves: dict[str, dict[int, float]] = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                name = "/".join(item.nested_key) or item.key
                curves.setdefault(name, {})[record.history.step.num] = json.loads(item.value_json)
    return curves


@pytest.mark.distributed
def test_a_run_and_its_continuation_are_one_run_on_wandb(recipe_file: Path) -> None:
    needs_wandb()
    run_dir = recipe_file.parent / "run"
    for _ in range(2):  # the second has nothing left to do
        done = train(recipe_file, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    first, second = ([*records(file)] for file in files)
    runs = [next(r.run for r in found if r.WhichOneof("record_type") == "run") for found in (first, second)]
    assert {(run.project, run.run_group, run.entity, run.display_name) for run in runs} == {
        ("photos", "night", "lab", "run")
    }
    assert {run.run_id for run in runs} == {(run_dir / "wandb" / "id").read_text().strip()}
    curves = history(first)
    steps = read_events(run_dir, "step")
    for name in ("loss", "lr", "grad_norm", "epoch"):
        assert curves[f"train/{name}"] == {8 * event["step"]: pytest.approx(event[name]) for event in steps}
    assert curves["Train/Samples/lr"] == {8 * event["step"]: pytest.approx(event["lr"]) for event in steps}
    (end,) = [record.exit for record in first if record.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 0


@pytest.mark.slow
def test_who_is_not_logged_in_is_told_in_a_line(recipe_file: Path) -> None:
    needs_wandb()
    done = train(recipe_file, WANDB_BASE_URL=f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mixmae: error:")]
    assert "log.wandb:" in line
    assert "WANDB_MODE=offline" in line
    assert "Traceback" not in done.stderr


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_wandb(tiny_recipe())
    with pytest.raises(UsageError, match=r"log\.wandb\.project=p, but .* pip install 'mixmae\[wandb\]'"):
        check_wandb(tiny_recipe(**{"log.wandb.project": "p"}))


def test_deepspeed_gets_the_section_only_where_it_is_wanted() -> None:
    assert "wandb" not in deepspeed_config(tiny_recipe(), 1)
    config = deepspeed_config(tiny_recipe(**{"log.wandb": {"entity": "lab"}}), 1)
    assert config["wandb"] == {"enabled": True, "project": "mixmae", "group": None, "team": "lab"}
