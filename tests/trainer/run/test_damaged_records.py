"""No damaged record stops a run from starting again."""

from pathlib import Path

import pytest

from mixmae.base.run_directory import CHECKPOINTS, EVENTS, RECIPE, SHARDS, checkpoint_name
from mixmae.trainer.data.faults import Fault, FaultLog, Reason
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.run.provenance import check_run_dir, replaced_file, write_run_dir
from mixmae.trainer.tasks.registry import task_of
from mixmae.trainer.telemetry.events import begin_attempt, read_events
from tests.helpers import tiny_recipe

DAMAGE = [b"\x84\xff\x00\n", b'{"event": "step", "time{"event": "step", "time": 1}\n', b'{"event": "step"}\n', b"[]\n"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_does_not_stop_a_start(tmp_path: Path, damage: bytes) -> None:
    assert begin_attempt(tmp_path) == []
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(damage + b'{"event": "step", "time": 1, "step": 3}\n{"event": "preempted", "time": 2}\n')
    assert begin_attempt(tmp_path) == ["preempted"]
    assert [event["step"] for event in read_events(tmp_path, "step")] == [3]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_names_of_replaced_samples_do_not_stop_a_start(tmp_path: Path, damage: bytes) -> None:
    file = replaced_file(tmp_path, 0)
    fault = Fault(0, 1, Reason.DAMAGED, "", "0.tar", "0.tar: 1.jpg")
    FaultLog(file).add(fault)
    with file.open("ab") as stream:
        stream.write(damage)
    before = file.read_bytes()
    FaultLog(file).add(fault)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", [RECIPE, SHARDS])
@pytest.mark.parametrize("damage", [b"", b"\x84\xff\x00", b"{", b"[]", b"a: [", b"model"])
def test_a_damaged_copy_of_what_checkpoints_hold_does_not_stop_a_start(
    shards: Path, tmp_path: Path, name: str, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = task_of(tiny_recipe(**{"data.shards": str(shards), "run_dir": str(tmp_path)})).recipe
    index = open_index(shards)
    write_run_dir(recipe, index)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / CHECKPOINTS / checkpoint_name(4)).mkdir(parents=True)
    (tmp_path / name).write_bytes(damage)
    check_run_dir(recipe, index)
    assert caplog.messages == [f"{tmp_path / name} is damaged and is written anew; the checkpoint's own copy counts"]
    write_run_dir(recipe, index)
    assert (tmp_path / name).read_bytes() == whole
