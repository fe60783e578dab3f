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
from mixmae.trainer.checkpoints.layout import lost, point_to, set_aside
from mixmae.trainer.checkpoints.manifest import MANIFEST
from tests.trainer.checkpoints.test_manifest import make


def test_the_history_begins_with_what_newest_names(tmp_path: Path) -> None:
    assert checkpoint_history(tmp_path) == []
    assert newest_step(tmp_path) == 0
    folders = [make(tmp_path, step) for step in (4, 8, 12)]
    point_to(folders[1])
    assert checkpoint_history(tmp_path) == [folders[1], folders[0]]
    assert newest_step(tmp_path) == 8
    (tmp_path / CHECKPOINTS / NEWEST).write_text("step-00000099\n")
    assert checkpoint_history(tmp_path) == folders[::-1]
    (tmp_path / CHECKPOINTS / NEWEST).unlink()
    assert checkpoint_history(tmp_path) == folders[::-1]


def test_what_is_set_aside_is_kept_but_no_checkpoint(tmp_path: Path) -> None:
    aside = [set_aside(make(tmp_path, 4)) for _ in range(3)]
    assert len(set(aside)) == 3
    assert all((folder / MANIFEST).is_file() for folder in aside)
    assert complete_checkpoints(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * 14, b"\xff\xfe", b"..\n", b"step-\n", b"partial-00000003-0\n"])
def test_a_pointer_that_names_no_checkpoint_is_none(tmp_path: Path, content: bytes) -> None:
    """As a crash of the machine, or of its storage, leaves one."""
    make(tmp_path, 3)
    newest = make(tmp_path, 6)
    (tmp_path / CHECKPOINTS / NEWEST).write_bytes(content)
    assert named_newest(tmp_path) is None
    assert checkpoint_history(tmp_path)[0] == newest


def test_what_is_lost_leaves_traces(tmp_path: Path) -> None:
    assert lost(tmp_path) == []
    checkpoint = make(tmp_path, 3)
    assert lost(tmp_path) == []
    point_to(checkpoint)
    set_aside(checkpoint)
    assert lost(tmp_path) == [f"damaged-{checkpoint.name}", NEWEST]
