import errno
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixmae.launch import cli
from mixmae.launch.cli import COMMANDS, main, usage
from tests.helpers import ROOT

BLOCKED = "import sys; sys.modules.update(dict.fromkeys(['torch', 'deepspeed', 'numpy', 'timm'])); "
RUN = "import sys; from mixmae.launch.cli import main; sys.exit(main())"


def run(*argv: str, prelude: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", prelude + RUN, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_imports_neither_torch_nor_pydantic() -> None:
    show = "import sys; from mixmae.launch.cli import main; main(); "
    show += "print({'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", show, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has imported what some commands import first."""
    monkeypatch.setattr(sys, "argv", ["mixmae", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"mixmae {name}" in capsys.readouterr().out
    assert name in usage()


@pytest.mark.parametrize(
    ("name", "message"),
    [("train", "no command 'train'; expected one of launch"), ("lanch", "no command 'lanch'; did you mean 'mixmae la")],
)
def test_unknown_commands(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mixmae", name])
    assert main() == 2
    assert message in capsys.readouterr().err


def test_an_empty_argument_is_no_working_directory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mixmae", "shards", "build", "", "out"])
    assert main() == 2
    assert "the argument after 'mixmae shards build' is empty" in capsys.readouterr().err


def test_a_working_directory_may_hold_folders_of_any_name(tmp_path: Path) -> None:
    """As this checkout has them; Python looks there first."""
    for name in ("models", "trainer", "launch", "monitoring", "configs", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "mixmae").mkdir()
    command = [sys.executable, "-m", "mixmae.launch.cli", "recipes", "show", "pretrain/demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mixmae_swin_nano" in done.stdout


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mixmae", "--version"])
    assert main() == 0
    assert re.fullmatch(r"mixmae \d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_closed_pipe_is_no_traceback(options: list[str]) -> None:
    """The command waits until its reader is gone."""
    command = [sys.executable, *options, "-c", f"input(); {RUN}", "recipes", "show", "pretrain/demo"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, stderr=-1)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, said = process.communicate(b"\n", timeout=200)
    assert said == b""
    assert process.returncode == 141


def test_a_dry_run_needs_no_name_resolution(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("nowhere1.invalid slots=1\nnowhere2.invalid slots=1\n")
    argv = ["configs/pretrain/demo.yaml", "--hostfile", str(tmp_path / "hosts"), f"run_dir={tmp_path / 'run'}"]
    done = run("launch", *argv, "--dry-run", prelude=BLOCKED)
    assert done.returncode == 0, done.stderr
    assert "--master_addr nowhere1.invalid" in done.stdout
    assert run("launch", *argv, prelude=BLOCKED).returncode == 2


def test_launching_works_without_torch() -> None:
    argv = ["configs/pretrain/demo.yaml", "--local", "2", "--dry-run", "seed=3", "run_dir=/tmp/a b"]
    done = run("launch", *argv, prelude=BLOCKED)
    assert done.returncode == 0, done.stderr
    assert "-m deepspeed.launcher.runner" in done.stdout
    assert "--hostfile /dev/null --num_gpus 2" in done.stdout
    assert "--module mixmae.launch.supervision.rank" in done.stdout
    assert re.search(r"mixmae\.trainer\.train --world-size 2 '/tmp/a b/launches/\S+\.yaml'\n$", done.stdout)
    assert "\nseed: 3\n" in done.stderr
    assert not Path("/tmp/a b").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.yaml", "--local", "2"], "does not exist"),
        (["configs/pretrain/demo.yaml", "--local", "0"], "expected 1 or more"),
        (["configs/pretrain/demo.yaml", "--local", "2", "data.shards=nowhere"], "shard directory nowhere does not"),
        (["configs/pretrain/demo.yaml", "--local", "3"], "does not divide"),
        (["configs/pretrain/demo.yaml", "--local", "2", "train.zero=1"], "did you mean 'train.zero_stage'"),
    ],
)
def test_mistakes_are_found_before_anything_starts(argv: list[str], message: str) -> None:
    done = run("launch", *argv, prelude=BLOCKED)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.ENAMETOOLONG, errno.ENOENT])
def test_a_file_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    def main(argv: Sequence[str]) -> int:
        raise OSError(code, "what is wrong", argv[0])

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=lambda name: SimpleNamespace(main=main)))
    monkeypatch.setattr(sys, "argv", ["mixmae", "curves", "some/file"])
    assert cli.main() == 2
    assert capsys.readouterr().err == "mixmae: error: some/file: what is wrong\n"


def test_a_full_disk_without_a_name_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=lambda name: SimpleNamespace(main=main)))
    monkeypatch.setattr(sys, "argv", ["mixmae", "curves"])
    assert cli.main() == 2
    assert capsys.readouterr().err.startswith("mixmae: error: a file, or standard output, cannot be written: No space")
