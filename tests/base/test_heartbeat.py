"""What a rank writes of itself is what its reader finds; a stopped process no longer ticks."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mixmae.base.heartbeat import HEARTBEAT, Beat, Heartbeat, begin_heartbeat, read_beat
from tests.helpers import ROOT, tiny_recipe
from tests.warm import run_module

RANK = """
import sys, time
from pathlib import Path
from mixmae.base.heartbeat import Heartbeat
beat = Heartbeat(Path(sys.argv[1]), interval=0.01)
beat.set_phase("backward", 7)
print("there", flush=True)
time.sleep(60)
"""


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rank"
    assert read_beat(file) is None
    beat = Heartbeat(file)
    beat.set_phase("forward", 3)
    beat.set_phase("backward")
    before = time.monotonic()
    found = read_beat(file)
    beat.close()
    assert found is not None
    assert (found.step, found.phase) == (3, "backward")
    assert found.since <= before


def beat_of(file: Path, holds: Callable[[Beat], bool]) -> Beat:
    """What is written, once it is as wanted."""
    deadline = time.monotonic() + 100
    while (beat := read_beat(file)) is None or not holds(beat):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return beat


def test_a_stopped_process_does_not_tick(tmp_path: Path) -> None:
    file = tmp_path / "rank"
    with subprocess.Popen([sys.executable, "-c", RANK, str(file)], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "there\n"
        beat_of(file, lambda beat: beat.ticked > beat.since)
        os.kill(rank.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, rank.pid, os.WSTOPPED)
        stopped = read_beat(file)
        time.sleep(0.2)  # as long as twenty ticks
        assert read_beat(file) == stopped
        rank.kill()
    assert stopped is not None
    assert (stopped.step, stopped.phase) == (7, "backward")


@pytest.mark.distributed
def test_a_run_tells_where_it_is_to_its_end(shards: Path, tmp_path: Path) -> None:
    recipe, beat = tmp_path / "recipe.yaml", tmp_path / "beat"
    recipe.write_text(tiny_recipe(**{"data.shards": str(shards), "run_dir": str(tmp_path / "run")}).to_yaml())
    done = run_module("mixmae.trainer.train", str(recipe), "monitoring.enabled=false", **{HEARTBEAT: str(beat)})
    assert done.returncode == 0, done.stderr
    last = read_beat(beat)
    assert last is not None
    assert (last.step, last.phase) == (8, "ending")


def test_a_run_tells_that_it_starts_before_torch_is_there(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(3)\n")
    environment = {**os.environ, HEARTBEAT: str(tmp_path / "beat"), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    (tmp_path / "recipe.yaml").touch()
    command = [sys.executable, "-m", "mixmae.trainer.train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, env=environment, check=False)
    beat = read_beat(tmp_path / "beat")
    assert done.returncode == 3
    assert beat is not None
    assert (beat.step, beat.phase) == (0, "starting")


def test_listeners_are_called_at_every_tick_until_they_are_removed() -> None:
    beat = Heartbeat(interval=0.001)
    calls: list[str] = []
    tenth = threading.Event()

    def listen() -> None:
        calls.append(threading.current_thread().name)
        if len(calls) == 10:
            tenth.set()

    beat.add_listener(listen)
    assert calls[0] == threading.current_thread().name
    assert tenth.wait(60)
    beat.remove_listener(listen)
    heard = len(calls)
    other = threading.Event()
    beat.add_listener(lambda: other.set() if threading.current_thread().name == "heartbeat" else None)
    assert other.wait(60)
    beat.close()
    assert len(calls) == heard
    assert set(calls[1:]) == {"heartbeat"}


def test_without_a_launcher_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    beat = begin_heartbeat({})
    beat.set_phase("forward", 1)
    beat.close()
    assert list(tmp_path.iterdir()) == []
