"""Processes, their output and their ends: nothing is lost, nothing is left, nothing blocks."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mixmae.launch.supervision.child import Child, ended_within
from mixmae.launch.supervision.outcome import Exit
from mixmae.launch.supervision.output import KEPT_LINES, Console

GUARDED = """
import os, signal, subprocess, sys
from mixmae.launch.supervision.orphans import Guard
guard = Guard()
many = ["sh", "-c", "sleep 1000 & sleep 1000 & wait"]
group = subprocess.Popen(many, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
guard.protect(group.pid)
print(group.pid, flush=True)
if sys.argv[1] == "release":
    guard.release()
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def child(code: str, log: Path, *arguments: str) -> Child:
    return Child([sys.executable, "-c", code, *arguments], {**os.environ, "PYTHONFAULTHANDLER": "1"}, log)


def end_of(process: Child, seconds: float = 60.0) -> Exit:
    assert asyncio.run(ended_within(process, seconds))
    ended = process.poll()
    assert ended is not None
    return ended


def group(number: int) -> list[psutil.Process]:
    """Live processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def eventually(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("code", "ended"),
    [("", (0, None)), ("raise SystemExit(85)", (85, None)), ("import os; os.kill(os.getpid(), 9)", (None, 9))],
)
def test_exits_are_reported(tmp_path: Path, code: str, ended: tuple[int | None, int | None]) -> None:
    found = end_of(child(code, tmp_path / "log"))
    assert (found.code, found.signal) == ended


def test_all_output_is_logged_and_the_last_lines_are_kept(tmp_path: Path) -> None:
    code = "for n in range(5000): print('out', n)\nprint('10 %\\r20 %\\r30 %', end='')"
    ended = end_of(child(code, tmp_path / "log"))
    lines = [f"out {n}" for n in range(5000)]
    assert (tmp_path / "log").read_bytes() == "\n".join([*lines, "10 %\r20 %\r30 %"]).encode()
    assert ended.lines == [*lines[-KEPT_LINES + 1 :], "30 %"]


def test_the_console_leaves_errors_to_the_final_message(capfd: pytest.CaptureFixture[str]) -> None:
    console = Console()
    noise = (
        "[2026-11-28 10:31:04,501] [WARNING] [real_accelerator.py:213:get_accelerator] Setting accelerator to CPU.\n"
    )
    console.show(f"{noise}step 1/6\nmixmae: error: unknown key\n 50%\r100%\rstep".encode())
    console.close(60)
    assert capfd.readouterr().out == "step 1/6\n 50%\r100%\rstep"


def test_a_log_that_cannot_be_written_does_not_stop_the_process(tmp_path: Path) -> None:
    full = tmp_path / "log"
    full.symlink_to("/dev/full")
    ended = end_of(child("for n in range(100000): print('a long line of output', n)", full))
    assert ended.code == 0
    assert ended.lines[-2:] == [
        "a long line of output 99999",
        f"[{full} could not be written: No space left on device]",
    ]


def test_descendants_end_with_the_process(tmp_path: Path) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '1000']); print('there')"
    process = child(code, tmp_path / "log")
    assert end_of(process).code == 0
    assert eventually(lambda: not group(process.group))


def test_the_traceback_of_a_hanging_process_is_in_its_log(tmp_path: Path) -> None:
    code = "import time\ndef stuck_here():\n    print('go', flush=True)\n    time.sleep(1000)\nstuck_here()"
    process = child(code, tmp_path / "log")
    assert eventually(lambda: "go" in (tmp_path / "log").read_text())
    process.dump_and_abort()
    ended = end_of(process)
    assert ended.signal == signal.SIGABRT
    assert any("in stuck_here" in line for line in ended.lines), ended
    assert not list(tmp_path.glob("core*"))


def test_a_signal_reaches_only_the_process(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('asked', flush=True))\n"
        "worker = subprocess.Popen(['sleep', '1000'])\nprint('there', flush=True)\n"
        "signal.pause()\ntime.sleep(0.2)\nprint('worker', worker.poll(), flush=True)"
    )
    process = child(code, tmp_path / "log")
    assert eventually(lambda: "there" in (tmp_path / "log").read_text())
    process.send(signal.SIGUSR1)
    assert list(end_of(process).lines) == ["there", "asked", "worker None"]


@pytest.mark.parametrize("end", ["kill", "release"])
def test_a_guard_kills_its_owners_group(end: str) -> None:
    owner = subprocess.run([sys.executable, "-c", GUARDED, end], capture_output=True, text=True, check=False)
    number = int(owner.stdout)
    try:
        if end == "kill":
            assert owner.returncode == -signal.SIGKILL
            assert eventually(lambda: not group(number))
        else:
            assert owner.returncode == 0
            assert not eventually(lambda: len(group(number)) < 3, 0.5)
    finally:
        if end == "release":
            os.killpg(number, signal.SIGKILL)
