"""Files appear whole or not at all, and leave nothing beside them."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mixmae.base import files
from mixmae.base.files import atomic_write, new_directory, publish, replacing, what_is


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes: the system refuses, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fail_halfway(file: Path) -> None:
    file.write_text("half")
    raise RuntimeError


@pytest.mark.parametrize("content", ["ä\n", b"\x00\xff"])
def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    atomic_write(file, content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with full_disk(4), pytest.raises(OSError, match=rf"(No space.*|File too large): '{file}'$"):
        atomic_write(file, "longer than there is room")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(RuntimeError), replacing(file) as partial:
        fail_halfway(partial)
    assert file.read_text() == "old"
    with replacing(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), new_directory(out) as partial:
        fail_halfway(partial / "file")
    assert list(out.parent.iterdir()) == []
    with new_directory(out) as partial:
        (partial / "file").write_text("whole")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "file").read_text() == "whole"


def test_nobodys_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(OSError, match="not empty"), new_directory(tmp_path / "out") as partial:
        (partial / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "out", "out.partial"]


def test_all_content_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def sync(path: Path) -> None:
        synced.append(path.name if not (tmp_path / "out").exists() else f"{path.name} with its new name")

    (tmp_path / "partial" / "inner").mkdir(parents=True)
    (tmp_path / "partial" / "inner" / "file").touch()
    monkeypatch.setattr(files, "sync", sync)
    publish(tmp_path / "partial", tmp_path / "out")
    assert sorted(synced[:-1]) == ["file", "inner", "partial"]
    assert synced[-1] == f"{tmp_path.name} with its new name"
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


def test_what_a_path_is_in_place_of_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    found = {name: what_is(tmp_path / name) for name in ("file", ".", "fifo", "link", "circle", "file/x", "x" * 300)}
    assert found == {
        "file": "is a file",
        ".": "is a directory",
        "fifo": "is a FIFO",
        "link": "is a link to nothing",
        "circle": "is out of reach (Too many levels of symbolic links)",
        "file/x": "is out of reach (Not a directory)",
        "x" * 300: "is out of reach (File name too long)",
    }
    assert (what_is(tmp_path / "none"), what_is(Path("/dev/null"))) == ("does not exist", "is a device")
