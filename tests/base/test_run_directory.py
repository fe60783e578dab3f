"""A run's newest checkpoint is one under a checkpoint's name, whatever else lies beside it."""

from pathlib import Path

from mixmae.base.run_directory import (
    CHECKPOINTS,
    checkpoint_name,
    checkpoint_step,
    complete_checkpoints,
    newest_checkpoint,
    newest_step,
)


def test_a_name_says_its_step() -> None:
    assert [checkpoint_step(Path(checkpoint_name(step))) for step in (0, 7, 123_456_789)] == [0, 7, 123_456_789]


def test_what_only_looks_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    assert (newest_checkpoint(tmp_path), newest_step(tmp_path)) == (None, 0)
    for name in ("step-00000004", "step-00000008", "step-00000008-copy", "step-00000012.bak", "step-", "partial-1"):
        (tmp_path / CHECKPOINTS / name).mkdir(parents=True)
    (tmp_path / CHECKPOINTS / "step-00000016").touch()
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [4, 8]
    assert newest_step(tmp_path) == 8
