import os
import shutil
import tempfile
from pathlib import Path

import pytest

from mixmae.base import machine
from mixmae.base.errors import UsageError
from mixmae.base.machine import require_shared_memory, require_temporary_folder, require_writable


def test_a_directory_is_made_and_left_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b", "run_dir")
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("where", ["file", "file/below", "x" * 300, "loop"])
def test_what_cannot_be_written_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match=r"^run_dir=.*files cannot be written there \([A-Z].*\); name another"):
        require_writable(tmp_path / where, "run_dir")


def test_too_little_shared_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    require_shared_memory(1)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UsageError, match=r"--shm-size.*lower data.prefetch_factor"):
        require_shared_memory(2 * free + 2**30)
    with monkeypatch.context() as read_only:
        read_only.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(UsageError, match="cannot be written; mount a tmpfs"):
            require_shared_memory(1)
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    require_shared_memory(0)
    with pytest.raises(UsageError, match="mount a tmpfs"):
        require_shared_memory(1)


def test_a_machine_without_temporary_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/no"])
    with pytest.raises(UsageError, match="set TMPDIR"):
        require_temporary_folder()
