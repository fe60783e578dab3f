import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from mixmae.launch.commands.watch import main
from mixmae.launch.commands.watch_runs import table_of
from tests.helpers import ROOT
from tests.launch.commands.views import FULL, events

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from mixmae.launch.commands.watch import main; from mixmae.base.errors import run_cli; "
    "sys.exit(run_cli(main, sys.argv[1:]))",
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "nano"
    folder.mkdir()
    lines = [json.dumps(record) for record in events(until=time.time())]
    (folder / "events.jsonl").write_text("\n".join(lines) + '\n{"event": "st')
    (folder / "recipe.yaml").write_text("encoder: {name: nano}\ntrain: {global_batch: 64}\n")
    return folder


def call(*argv: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    words = [*COMMAND, *map(str, argv)]
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, env={**plain, **environment}, timeout=200
    )


def on_terminal(*argv: object, columns: int = 100, interrupt_after: str = "", **environment: str) -> tuple[int, str]:
    """Runs the command in a pseudo-terminal; SIGINT once a text was shown. Its exit code and all it wrote."""
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    shown = {**plain, "TERM": "xterm-256color", **environment}
    process = subprocess.Popen(
        [*COMMAND, *map(str, argv)], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=shown, close_fds=True
    )
    os.close(slave)
    out, signalled = b"", False
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux' way to say that the other end is closed
            break
        out += part
        if interrupt_after and not signalled and out.count(interrupt_after.encode()) >= 2:
            process.send_signal(signal.SIGINT)
            signalled = True
        if not part:
            break
    os.close(master)
    return process.wait(200), out.decode()


def test_once_in_a_pipe(run_dir: Path) -> None:
    done = call(run_dir, "--once", COLUMNS="90")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "nano   running   nano, 64 ranks, 64 images a step" in done.stdout
    assert "step 200 of 1,000" in done.stdout
    assert "ranks are not shown: no exporter is announced" in done.stdout
    assert call(run_dir, "--once", PYTHONIOENCODING="ascii").returncode == 0


def test_runs_of_a_folder_are_a_table(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_dir.parent / "more" / "second"
    folder.mkdir(parents=True)
    assert main([str(run_dir.parent), "--once"]) == 0
    assert "step 200 of 1,000" in capsys.readouterr().out  # one run is shown in full
    failed = {"event": "failed", "time": time.time(), "step": 200}
    lines = [json.dumps(record) for record in [*events(until=time.time()), failed]]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    assert main([str(run_dir.parent), str(folder), "--once"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["run", "state", "step", "%"]
    assert [row.split()[:4] for row in rows] == [["second", "failed", "200", "20"], ["nano", "running", "200", "20"]]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_table_of_runs_fits_its_terminal(width: int) -> None:
    views = [replace(FULL, name=f"run-{number}-{'x' * 70}") for number in range(30)]
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table_of(views, width, height=24))
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len(lines) < 24
    assert lines[-1] == "and 9 more"
    assert all("late" in line for line in lines[1:-1])


def test_on_a_terminal_with_and_without_colour(run_dir: Path) -> None:
    code, text = on_terminal(run_dir, "--once", columns=110)
    assert code == 0
    assert "\x1b[1;32m" in text
    code, text = on_terminal(run_dir, "--once", NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[\d;]*3\d", text)


def test_watching_goes_on_until_ctrl_c(run_dir: Path) -> None:
    code, text = on_terminal(run_dir, "--interval", "0.2", interrupt_after="step 200")
    assert code == 0
    assert "Traceback" not in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_watching_ends_with_the_run(run_dir: Path) -> None:
    with (run_dir / "events.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps({"event": "end", "time": time.time(), "step": 1000}) + "\n")
    done = call(run_dir, "--interval", "0.1")
    assert done.returncode == 0
    assert done.stdout.count("finished") == 1
    assert "invalid lines in events.jsonl that are skipped: 1" in done.stdout


def test_a_closed_pipe_is_no_traceback(run_dir: Path) -> None:
    words = " ".join(f"'{word}'" for word in [*COMMAND, str(run_dir), "--interval", "0.1"])
    done = subprocess.run(f"{words} | head -1", shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/nonexistent"], "/nonexistent is not a run directory: it has neither recipe.yaml nor events.jsonl"),
        (["http://127.0.0.1:1"], "http://127.0.0.1:1 is not a run's exporter: Connection refused"),
        (["ftp://a"], "is not a run's exporter: ftp://a/metrics is no http:// or https:// address"),
        (["/tmp", "--interval", "0"], "--interval 0: expected 0.1 seconds or more"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str) -> None:
    done = call(*argv)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_only_this_command_imports_rich() -> None:
    show = "import sys, mixmae.launch.cli, mixmae.monitoring.watch.view; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
