"""What a rank writes of itself is what its reader finds; a stopped process no longer ticks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trainer.heartbeat import Heartbeat, read_beat

RANK = """
import sys, time
from pathlib import Path
from trainer.heartbeat import Heartbeat
beat = Heartbeat(Path(sys.argv[1]))
beat.at("backward", 7)
print("there", flush=True)
time.sleep(60)
"""


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rank"
    assert read_beat(file) is None
    beat = Heartbeat(file)
    beat.at("forward", 3)
    beat.at("backward")
    before = time.monotonic()
    found = read_beat(file)
    beat.close()
    assert found is not None
    assert (found.step, found.part) == (3, "backward")
    assert found.since <= before


def test_a_stopped_process_does_not_tick(tmp_path: Path) -> None:
    file = tmp_path / "rank"
    with subprocess.Popen([sys.executable, "-c", RANK, str(file)], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "there\n"
        time.sleep(2.2)
        running = read_beat(file)
        os.kill(rank.pid, signal.SIGSTOP)
        time.sleep(0.2)
        stopped_at = read_beat(file)
        time.sleep(2.2)
        stopped = read_beat(file)
        rank.kill()
    assert running is not None
    assert stopped is not None
    assert running.ticked > running.since
    assert stopped == stopped_at
    assert (stopped.step, stopped.part) == (7, "backward")
