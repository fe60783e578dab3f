"""Of a run's checkpoints, the history is what one would resume from."""

from pathlib import Path

import pytest

from mixmae.base.run_directory import (
    CHECKPOINTS,
    NEWEST,
    checkpoint_history,
    complete_checkpoints,
    named_newest,
    newest_step,
)
from mixmae.trainer.checkpoints.layout import inconsistencies, quarantine, remnants, set_newest
from mixmae.trainer.checkpoints.manifest import MANIFEST
from tests.trainer.checkpoints.test_manifest import make


def test_the_history_begins_with_what_newest_names(tmp_path: Path) -> None:
    assert checkpoint_history(tmp_path) == []
    assert newest_step(tmp_path) == 0
    folders = [make(tmp_path, step) for step in (4, 8, 12)]
    set_newest(folders[1])
    assert checkpoint_history(tmp_path) == [folders[1], folders[0]]
    assert newest_step(tmp_path) == 8
    assert inconsistencies(tmp_path) == [
        "step-00000012 is later than step-00000008, which checkpoints/newest names, and is not used"
    ]
    set_newest(folders[2])
    assert inconsistencies(tmp_path) == []
    (tmp_path / CHECKPOINTS / NEWEST).write_text("step-00000099\n")
    assert inconsistencies(tmp_path) == ["checkpoints/newest names no existing checkpoint; using the last complete one"]
    assert checkpoint_history(tmp_path) == folders[::-1]
    (tmp_path / CHECKPOINTS / NEWEST).unlink()
    assert checkpoint_history(tmp_path) == folders[::-1]


def test_a_quarantined_checkpoint_is_kept_but_not_resumed_from(tmp_path: Path) -> None:
    quarantined = [quarantine(make(tmp_path, 4)) for _ in range(3)]
    assert len(set(quarantined)) == 3
    assert all((folder / MANIFEST).is_file() for folder in quarantined)
    assert complete_checkpoints(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * 14, b"\xff\xfe", b"..\n", b"step-\n", b"partial-00000003-0\n"])
def test_an_invalid_newest_file_is_ignored(tmp_path: Path, content: bytes) -> None:
    """As a crash of the machine, or of its storage, leaves one."""
    make(tmp_path, 3)
    newest = make(tmp_path, 6)
    (tmp_path / CHECKPOINTS / NEWEST).write_bytes(content)
    assert named_newest(tmp_path) is None
    assert checkpoint_history(tmp_path)[0] == newest


def test_remnants_of_lost_checkpoints(tmp_path: Path) -> None:
    assert remnants(tmp_path) == []
    checkpoint = make(tmp_path, 3)
    assert remnants(tmp_path) == []
    set_newest(checkpoint)
    quarantine(checkpoint)
    assert remnants(tmp_path) == [f"damaged-{checkpoint.name}", NEWEST]
