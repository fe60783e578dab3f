"""What `mixmae demo` removes and what it leaves alone; tests/test_slow.py runs all of it."""

import os
import subprocess
from pathlib import Path

import pytest

from mixmae.base.errors import UsageError
from mixmae.launch.commands import demo


def made_by_demo(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / demo.MARK).touch()
    return folder


def test_a_demo_removes_what_an_earlier_one_made_and_nothing_beside_it(tmp_path: Path) -> None:
    for name in demo.FOLDERS:
        made_by_demo(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "probe.json").touch()
    demo.remove_earlier(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "probe.json"]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling"])
@pytest.mark.parametrize("name", demo.FOLDERS)
def test_what_no_demo_made_is_never_removed(tmp_path: Path, name: str, kind: str) -> None:
    out, elsewhere = tmp_path / "out", made_by_demo(tmp_path / "elsewhere")
    (elsewhere / "mine.tar").touch()
    others = [made_by_demo(out / other) for other in demo.FOLDERS if other != name]
    if kind == "folder":
        (out / name).mkdir()
    elif kind == "file":
        (out / name).touch()
    else:
        (out / name).symlink_to(elsewhere if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(UsageError, match=rf"out/{name} was not made by 'mixmae demo'"):
        demo.main(["--out", str(out)])
    assert (elsewhere / "mine.tar").exists()
    assert all(other.exists() for other in others)
    assert os.path.lexists(out / name)


def test_whatever_a_command_of_the_demo_leaves_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it fails or is interrupted: else the next demo would refuse to start."""
    out = tmp_path / "out"

    def interrupted(argv: list[str]) -> int:
        if "synth" in argv:
            Path(argv[argv.index("synth") + 1]).mkdir(parents=True)
            return 0
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.main(["--out", str(out)])
    assert {path.parent.name for path in out.glob(f"*/{demo.MARK}")} == {"shards", "probe-shards", "few-labels", "run"}
    demo.remove_earlier(out)
    assert list(out.iterdir()) == []
